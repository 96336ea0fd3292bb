// Reads a text token by token, then writes the most likely tokens, with a state of constant size.
import * as ort from "onnxruntime-web";
import { AutoTokenizer, env } from "@huggingface/transformers";

const NEW_TOKENS = 40;
const [prompt, button, status, output] = ["prompt", "write", "status", "output"].map((id) => document.getElementById(id));
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./";
ort.env.wasm.numThreads = 1;

const { states, eos_token_ids } = await (await fetch("model/subquad.json")).json();
const tokenizer = await AutoTokenizer.from_pretrained("model");
const session = await ort.InferenceSession.create("model/model.onnx");
const size = (shape) => shape.reduce((a, b) => a * b, 1);
const integer = (value) => new ort.Tensor("int64", BigInt64Array.of(BigInt(value)), [1, 1]);

function highest(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

async function* generate(ids) {
  let held = Object.fromEntries(
    Object.entries(states).map(([name, shape]) => [name, new ort.Tensor("float32", new Float32Array(size(shape)), shape)]),
  );
  for (let position = 0, token; position < ids.length + NEW_TOKENS - 1; position++) {
    const feeds = { input_ids: integer(ids[position] ?? token), position_ids: integer(position), ...held };
    const results = await session.run(feeds);
    held = Object.fromEntries(Object.keys(states).map((name) => [name, results[`next_${name}`]]));
    if (position < ids.length - 1) continue;
    token = highest(results.logits.data);
    if (eos_token_ids.includes(token)) return;
    yield token;
  }
}

async function write() {
  button.disabled = true;
  const ids = tokenizer.encode(prompt.value);
  const written = [];
  const start = performance.now();
  for await (const token of generate(ids)) {
    written.push(token);
    output.textContent = tokenizer.decode([...ids, ...written], { skip_special_tokens: true });
    const speed = (ids.length + written.length) / ((performance.now() - start) / 1000);
    status.textContent = `${written.length} tokens, ${speed.toFixed(0)} a second, the prompt included`;
    await new Promise(requestAnimationFrame);
  }
  output.dataset.tokens = JSON.stringify(written);
  button.disabled = false;
}

button.addEventListener("click", write);
button.disabled = false;
status.textContent = `${(4 * Object.values(states).map(size).reduce((a, b) => a + b, 0) / 1000).toFixed(0)} kB of state`;
