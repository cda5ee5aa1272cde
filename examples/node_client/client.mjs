// Opens a picture, prints its features, sets one and writes what was drawn: the contract straight from protos/.
//
//     npm install --no-package-lock
//     node client.mjs boat.png night 1.0 night.png        # FACETEER_ADDRESS, else localhost:50050
import { readFile, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [picture, feature, value, output] = process.argv.slice(2);
if (!output) {
  console.error("usage: node client.mjs PICTURE FEATURE VALUE OUTPUT");
  process.exit(2);
}
const address = process.env.FACETEER_ADDRESS ?? "localhost:50050";
const definition = loader.loadSync("faceteer/v1/studio.proto", {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  longs: String, // seeds are 64 bits wide
  enums: String,
  oneofs: true,
  defaults: true, // empty labels and zeros are not sent: show them all the same
});
const { StudioService } = grpc.loadPackageDefinition(definition).faceteer.v1;
// Pictures are larger than gRPC's default of 4 MiB.
const studio = new StudioService(address, grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": 256 * 1024 * 1024,
});
const within = (seconds) => ({ deadline: Date.now() + 1000 * seconds });

const image = await readFile(picture);
const opened = await new Promise((resolve, reject) =>
  studio.OpenImage({ input: { image }, maxFeatures: 8 }, within(60), (error, answer) =>
    error ? reject(error) : resolve(answer),
  ),
);
for (const { index, label, activation } of opened.features) console.log(`#${index}`, label, activation.toFixed(3));

const events = studio.EditImage(
  {
    input: { embeddingId: opened.embedding.embeddingId },
    edits: [
      { feature: { label: feature }, operation: "EDIT_OPERATION_SET", value: Number(value), unit: "EDIT_UNIT_SCALED" },
    ],
    settings: { seeds: ["7"] },
    // Refused, rather than misread, by a server whose feature indices mean something else.
    expectedRevisions: { encoder: opened.revisions.encoder, sae: opened.revisions.sae },
  },
  within(600),
);
for await (const message of events) {
  if (message.edited) {
    for (const { label, beforeScaled, achievedScaled } of message.edited.report.outcomes)
      console.log(`${label}: ${beforeScaled.toFixed(2)} -> ${achievedScaled.toFixed(2)}`);
  } else if (message.progress) {
    process.stderr.write(`\rstep ${message.progress.step} of ${message.progress.steps} `);
  } else if (message.image) {
    await writeFile(output, message.image.data);
    console.log(`wrote ${output}`);
  }
}
studio.close();
