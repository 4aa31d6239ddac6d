// The server's API as this page uses it: the model's name, and a chat completion as a stream of server-sent events.

/** What the server refused or how the connection failed, in words for the reader. status 0: no answer at all. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** {id, context_length?} of the model that is served. */
export async function firstModel({ key, signal }) {
  const response = await request("v1/models", { headers: headers(key), signal });
  const model = (await body(response))?.data?.[0];
  if (!model?.id) throw new ServerError("The server names no model.");
  return model;
}

/** The chunks of one streamed completion, as parsed JSON. Ends after [DONE]; a cut connection is an error. */
export async function* complete(fields, { key, signal }) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...fields, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of eventData(response.body.pipeThrough(new TextDecoderStream()))) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk === null) throw new ServerError("The server sent something that is not JSON.");
    if (chunk.error) throw new ServerError(chunk.error.message ?? "The server stopped with an error.");
    yield chunk;
  }
  throw new ServerError("The connection ended before the answer did.");
}

/** Add a delta to an assistant message, in place. */
export function fold(message, delta) {
  message.reasoning_content += delta.reasoning_content ?? "";
  message.content += delta.content ?? "";
  for (const part of delta.tool_calls ?? []) {
    const index = part.index ?? 0;
    while (message.tool_calls.length <= index) {
      const id = `call_${message.tool_calls.length}`; // until the server gives one
      message.tool_calls.push({ id, type: "function", function: { name: "", arguments: "" } });
    }
    const call = message.tool_calls[index];
    if (part.id) call.id = part.id;
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }
}

/** The data of each event in a text stream; comments (": keep-alive") and other fields are passed over. */
async function* eventData(stream) {
  let rest = "";
  let data = [];
  const reader = stream.getReader(); // by hand: not every browser can loop over a stream
  for (let piece = await read(reader); !piece.done; piece = await read(reader)) {
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line !== "" || !data.length) continue;
      yield data.join("\n");
      data = [];
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw connectionError(error, "The connection to the server was lost.");
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw connectionError(error, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const message = (await body(response))?.error?.message ?? `The server answered ${response.status}.`;
  const seconds = response.headers.get("Retry-After");
  throw new ServerError(seconds ? `${message} (try again in ${seconds} s)` : message, response.status);
}

/** fetch reports a lost connection as a TypeError; an abort is the reader's own doing and stays what it is. */
function connectionError(error, message) {
  return error instanceof TypeError ? new ServerError(message) : error;
}

async function body(response) {
  return parsed(await response.text());
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    if (error instanceof SyntaxError) return null;
    throw error;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}
