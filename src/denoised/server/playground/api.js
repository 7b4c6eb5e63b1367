// The server's API: requests with the key of this tab, answers as data, streams as events, errors as ApiError.

const KEY = "denoised-key";

export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  drop: () => sessionStorage.removeItem(KEY),
};

/** An answer that is not an error. `body`: plain data is sent as JSON, FormData as a form. */
export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const isForm = body instanceof FormData;
  if (body !== undefined && !isForm) headers["Content-Type"] = "application/json";
  const sent = body === undefined || isForm ? body : JSON.stringify(body);
  const answer = await fetch(path, { method, headers, body: sent, signal, cache: "no-store" }).catch(unreachable);
  if (answer.ok) return answer;
  throw new ApiError(answer.status, await problemOf(answer));
}

function unreachable(error) {
  if (error.name === "AbortError") throw error;
  throw new ApiError(0, { message: "The server cannot be reached. Is it still running?", code: "unreachable" });
}

async function problemOf(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return { message: `The server answered ${answer.status} ${answer.statusText}.` };
  }
}

/** The events of a stream, as data. An event `error` is thrown. */
export async function* stream(path, options) {
  const answer = await ask(path, { method: "POST", ...options });
  for await (const data of eventsOf(answer.body)) {
    if (data.type === "error") throw new ApiError(200, data.error);
    yield data;
  }
}

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const line = block.split("\n").find((one) => one.startsWith("data: "));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

/** A blob of what JSON carries in base64. */
export function blobOf(base64, format = "png") {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}
