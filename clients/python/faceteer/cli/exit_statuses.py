"""The exit statuses of ``faceteer``.

=====  =========================================================================================
0      done
2      usage, or input that cannot be used: a file that is missing or no picture, a bad value or recipe
3      not found: an unknown feature (the nearest labels are named), an icon that was not made
4      the server cannot be reached, is starting, or is stopping
5      anything else: other models than a recipe's, a full queue, a deadline, a defect
130    interrupted
=====  =========================================================================================
"""

OK, BAD_INPUT, NOT_FOUND, UNREACHABLE, FAILED, INTERRUPTED = 0, 2, 3, 4, 5, 130
