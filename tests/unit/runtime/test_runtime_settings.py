"""Settings: flag > environment > default."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from faceteer_runtime.settings import ServiceSettings, fields_table, parse_together
from faceteer_runtime.settings_page import render
from pydantic import Field


class EncoderLike(ServiceSettings):
    encoder_max_batch: int = Field(32, ge=1, description="Most pictures in a batch.")


class GeneratorLike(ServiceSettings):
    generator_max_batch: int = Field(16, ge=1, description="Most pictures denoised together.")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("FACETEER_"):
            monkeypatch.delenv(name)


def test_a_flag_beats_the_environment_which_beats_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EncoderLike.parse([]).encoder_max_batch == 32
    monkeypatch.setenv("FACETEER_ENCODER_MAX_BATCH", "8")
    assert EncoderLike.parse([]).encoder_max_batch == 8
    assert EncoderLike.parse(["--encoder-max-batch", "4"]).encoder_max_batch == 4
    assert EncoderLike.parse(["--encoder-max-batch=4"]).encoder_max_batch == 4


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACETEER_REDIS_URL", "")
    assert ServiceSettings.parse([]).redis_url is None


def test_values_have_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACETEER_REFLECTION", "true")
    settings = ServiceSettings.parse(["--bundle", "some/where", "--drain-seconds", "0.5"])
    assert settings.reflection is True
    assert settings.bundle == Path("some/where")
    assert settings.drain_seconds == 0.5
    assert ServiceSettings.parse(["--no-reflection"]).reflection is False
    assert ServiceSettings.parse(["--reflection"]).reflection is True


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lissten", "x"], ["--lissten"]),
        (["stray"], ["stray"]),
        (["--max-queue"], ["--max-queue"]),
        (["--max-queue", "many"], ["--max-queue", "FACETEER_MAX_QUEUE", "integer", "'many'"]),
        (["--max-queue", "0"], ["--max-queue", "greater than or equal to 1", "'0'"]),
        (["--listen", "nonsense"], ["--listen", "HOST:PORT", "'nonsense'"]),
        (["--listen", "host:99999"], ["--listen", "HOST:PORT"]),
        (["--redis-url", "localhost:6379"], ["--redis-url", "redis://"]),
        (["--log-level", "loud"], ["--log-level", "'debug'"]),
    ],
)
def test_a_wrong_flag_or_value_is_one_clear_sentence(argv, words, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        ServiceSettings.parse(argv)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_a_fault_is_told_by_flag_variable_reason_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ServiceSettings.parse(["--max-queue", "0"])
    assert (
        "--max-queue (FACETEER_MAX_QUEUE): input should be greater than or equal to 1, not '0' (see --help)\n"
        in capsys.readouterr().err
    )


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FACETEER_THREADS", "-1")
    with pytest.raises(SystemExit):
        ServiceSettings.parse([])
    assert "FACETEER_THREADS" in capsys.readouterr().err


def test_help_documents_every_field_with_variable_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        EncoderLike.parse(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, info in EncoderLike.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert f"FACETEER_{name.upper()}" in text
        assert info.description, name
        assert " ".join(info.description.split()) in text


def test_help_and_table_say_what_can_be_given_and_spell_defaults_as_they_are_typed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Chosen(ServiceSettings):
        chosen_kind: Literal["One", "two"] | None = Field(None, description="Which.")
        chosen_name: str = Field("Ada", description="Whose.")
        chosen_loud: bool = Field(True, description="How.")

    with pytest.raises(SystemExit):
        Chosen.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--chosen-kind {One,two} Which. [FACETEER_CHOSEN_KIND; default none]" in text
    assert "--chosen-name NAME Whose. [FACETEER_CHOSEN_NAME; default Ada]" in text
    assert "How. [FACETEER_CHOSEN_LOUD; default true]" in text
    rows = fields_table(Chosen, without=ServiceSettings).splitlines()[2:]
    assert [row.split(" | ")[2] for row in rows] == ["none", "`Ada`", "`true`"]


def test_flags_of_others_can_be_left_alone() -> None:
    settings = EncoderLike.parse(["--all-in-one", "--generator-max-batch", "3", "--threads", "2"], ignore_unknown=True)
    assert settings.threads == 2


def test_several_services_share_one_command_line() -> None:
    encoder, generator = parse_together(
        (EncoderLike, GeneratorLike), ["--threads", "2", "--encoder-max-batch", "3", "--generator-max-batch", "5"]
    )
    assert isinstance(encoder, EncoderLike)
    assert isinstance(generator, GeneratorLike)
    assert (encoder.threads, generator.threads) == (2, 2)
    assert (encoder.encoder_max_batch, generator.generator_max_batch) == (3, 5)


def test_several_services_refuse_a_flag_that_belongs_to_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_together((EncoderLike, GeneratorLike), ["--sae-threads", "2"])
    assert "--sae-threads" in capsys.readouterr().err


def test_settings_can_be_taken_over_from_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACETEER_GENERATOR_MAX_BATCH", "9")
    encoder = EncoderLike.parse(["--listen", "127.0.0.1:1", "--max-queue", "7"])
    generator = GeneratorLike.from_other(encoder, max_queue=3)
    assert (generator.listen, generator.max_queue, generator.generator_max_batch) == ("127.0.0.1:1", 3, 9)


def test_the_page_on_configuration_says_what_the_code_does() -> None:
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    assert fields_table(ServiceSettings) in page
    assert render(page) == page, "run python -m faceteer_runtime.settings_page docs/configuration.md"


def test_a_subclass_table_holds_its_own_fields_only() -> None:
    table = fields_table(EncoderLike, without=ServiceSettings)
    assert "| `--encoder-max-batch` | `FACETEER_ENCODER_MAX_BATCH` | `32` | Most pictures in a batch. |" in table
    assert "--listen" not in table
