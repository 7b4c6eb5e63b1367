// One request, whatever the model makes, as the same events:
//   { type: "progress", step, total, position, eta }   { type: "preview", index, blob }
//   { type: "done", blobs, receipt }

import { ask, blobOf, stream } from "./api.js";

const PREVIEWS = 3; // OpenAI's bound
const POLL = 500; // milliseconds

export function making(info, request, signal) {
  return { image: images, video, audio }[info.kind](request, signal);
}

async function* images({ body, inputs, mask }, signal) {
  const asked = { ...body, stream: true, partial_images: PREVIEWS };
  const edits = inputs.length > 0;
  const sent = edits ? formOf(asked, { image: inputs, mask: mask ? [mask] : [] }) : asked;
  yield* pictures(stream(edits ? "v1/images/edits" : "v1/images/generations", { body: sent, signal }));
}

/** The picture that a draft began. */
export async function* continuation(draft, signal) {
  const body = { stream: true, partial_images: PREVIEWS };
  yield* pictures(stream(`v1/images/drafts/${encodeURIComponent(draft.id)}/continue`, { body, signal }));
}

async function* pictures(events) {
  const blobs = [];
  let receipt = {};
  for await (const event of events) {
    const kind = event.type.split(".").pop();
    if (kind === "progress") yield progress(event);
    else if (kind === "partial_image") yield { type: "preview", index: event.image_index, blob: blobIn(event) };
    else if (kind === "completed") blobs[event.image_index] = blobIn(event), receipt = event.receipt;
  }
  yield { type: "done", blobs, receipt };
}

/** Drafts, each event with its `index`; the last of each is { type: "draft", draft }. */
export async function* drafts({ body, inputs, mask }, n, steps, signal) {
  const asked = { ...body, n, stream: true, ...(steps ? { draft_steps: steps } : {}) };
  const sent = inputs.length ? formOf(asked, { image: inputs, mask: mask ? [mask] : [] }) : asked;
  for await (const event of stream("v1/images/drafts", { body: sent, signal })) {
    const kind = event.type.split(".").pop();
    const index = event.index;
    if (kind === "progress") yield { ...progress(event), index, goal: event.draft_step };
    else if (kind === "partial_image") yield { type: "preview", index, blob: blobIn(event) };
    else if (kind === "completed") {
      const { pictures: [picture], ...draft } = event;
      yield { type: "draft", index, draft: { ...draft, blob: blobOf(picture.b64_json, event.output_format) } };
    }
  }
}

export const forget = (draft) =>
  ask(`v1/images/drafts/${encodeURIComponent(draft.id)}`, { method: "DELETE" }).catch(() => null);

async function* video({ body, inputs }, signal) {
  const sent = inputs.length ? formOf(body, { input_reference: inputs.slice(0, 1) }) : body;
  let job = await (await ask("v1/videos", { method: "POST", body: sent, signal })).json();
  const path = `v1/videos/${encodeURIComponent(job.id)}`;
  try {
    while (job.status === "queued" || job.status === "in_progress") {
      yield progress(job);
      await new Promise((done) => setTimeout(done, POLL));
      job = await (await ask(path, { signal })).json();
    }
    if (job.status === "failed") throw new Error(job.error.message);
    const blob = await (await ask(`${path}/content`, { signal })).blob();
    yield { type: "done", blobs: [blob], receipt: job.receipt };
  } catch (error) {
    if (signal.aborted) await ask(path, { method: "DELETE" }).catch(() => null);
    throw error;
  }
}

async function* audio({ body }, signal) {
  yield { type: "progress", step: 0, total: 0, position: 0, eta: null };
  const answer = await ask("v1/audio/generate", { method: "POST", body, signal });
  const line = answer.headers.get("X-Denoised-Receipt");
  const seed = /; seed (\d+),/.exec(line ?? "")?.[1];
  yield { type: "done", blobs: [await answer.blob()], receipt: { line, seed: seed === undefined ? null : Number(seed) } };
}

const blobIn = (event) => blobOf(event.b64_json, event.output_format);

const progress = ({ step, total_steps, position, eta_seconds }) => ({
  type: "progress", step, total: total_steps, position, eta: eta_seconds,
});

/** The body as a form with files; objects are `name[key]`, as the server reads them. */
function formOf(body, files) {
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) {
    if (value !== null && typeof value === "object" && !Array.isArray(value))
      for (const [inner, one] of Object.entries(value)) form.append(`${name}[${inner}]`, JSON.stringify(one));
    else form.append(name, typeof value === "string" ? value : JSON.stringify(value));
  }
  for (const [name, blobs] of Object.entries(files)) for (const blob of blobs) form.append(name, blob, blob.name ?? "upload.png");
  return form;
}
