// The conversation: what was said, what is sent to the server, and the loop in which a model uses tools.

import { recall, keep } from "./store.js";
import { complete, firstModel, fold, ServerError } from "./stream.js";
import { runTool, toolSchemas } from "./tools.js";
import { AnswerView, questionView } from "./view.js";

const MAX_ROUNDS = 4; // of tool calls that are run for one question
const MIN_SECONDS = 0.02; // an answer that comes in one go has no rate
const NEAR_END = 80; // pixels: closer than this, the list follows the answer as it grows

/** A conversation shown in `list`. settings() gives what the reader has chosen, onChange(chat) hears of every turn,
 * onKeyNeeded() of a server that wants a key. */
export class Chat {
  constructor(list, { settings, onChange, onKeyNeeded }) {
    Object.assign(this, { list, settings, onChange, onKeyNeeded });
    this.running = null; // stops the answer under way
    this.model = null;
    this.isKept = true;
    this.messages = [];
    this.shown = []; // per message: {root}, {root: null} for a tool's result, which the call's card shows
    for (const message of recall("sessionStorage", "conversation", [])) {
      if (message.note?.state === "running") message.note.state = "stopped"; // the page was left meanwhile
      this.add(message);
    }
  }

  /** Ask and let the model answer. */
  async ask(text) {
    this.add({ role: "user", content: text });
    this.toEnd();
    await this.run();
  }

  /** Drop the last answer, with its tool calls, and let the model answer again. */
  async retry() {
    if (this.running) return;
    const last = this.messages.findLastIndex((message) => message.role === "user");
    this.cut(last + 1);
    await this.run();
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.cut(0);
    this.save();
    this.onChange(this);
  }

  save() {
    this.isKept = keep("sessionStorage", "conversation", this.messages.length ? this.messages : null);
  }

  async loadModel(signal) {
    this.model ??= await firstModel({ key: this.settings().key, signal });
    this.onChange(this);
  }

  async run() {
    const running = new AbortController();
    this.running = running;
    this.save();
    this.onChange(this);
    try {
      for (let round = 0; round <= MAX_ROUNDS; round++) {
        const message = await this.answer(running.signal);
        if (!hasWholeCalls(message) || running.signal.aborted) break;
        this.answerCalls(message, round < MAX_ROUNDS);
      }
    } finally {
      if (this.running === running) this.running = null;
      this.save();
      this.onChange(this);
    }
  }

  /** One answer of the model, streamed into a new message. */
  async answer(signal) {
    const settings = this.settings();
    const message = { role: "assistant", content: "", reasoning_content: "", tool_calls: [], note: { state: "running" } };
    if (settings.json) message.note.isJson = true;
    const history = forServer(this.messages);
    const view = this.add(message);
    const times = { begin: performance.now() };
    let frame = null;
    const draw = () => this.follow(() => { frame = null; view.update(); });
    this.toEnd();
    try {
      await this.loadModel(signal);
      for await (const chunk of complete(fields(this.model.id, history, settings), { key: settings.key, signal })) {
        take(message, chunk, times);
        frame ??= requestAnimationFrame(draw);
      }
      message.note.state = "done";
    } catch (error) {
      this.end(message.note, error);
    } finally {
      if (frame !== null) cancelAnimationFrame(frame);
      addFigures(message.note, times);
      draw();
    }
    return message;
  }

  /** Write down why an answer did not come to its end. */
  end(note, error) {
    note.state = error.name === "AbortError" ? "stopped" : "failed";
    note.error = error.message;
    if (error instanceof ServerError && error.status === 401) this.onKeyNeeded();
    else if (note.state === "failed" && !(error instanceof ServerError)) throw error; // the page's own mistake
  }

  answerCalls(message, isAllowed) {
    const settings = this.settings();
    for (const call of message.tool_calls) {
      const content = isAllowed ? runTool(call.function, settings) : `error: not run, ${MAX_ROUNDS} rounds were`;
      this.follow(() => this.add({ role: "tool", tool_call_id: call.id, content }));
    }
    if (!isAllowed) {
      message.note.finish = "rounds";
      this.shown[this.messages.indexOf(message)].update();
    }
  }

  /** Add a message, and show it. */
  add(message) {
    this.messages.push(message);
    const view = this.show(message);
    this.shown.push(view);
    if (view.root) this.list.append(view.root);
    return view;
  }

  show(message) {
    if (message.role === "user") return { root: questionView(message.content) };
    if (message.role === "assistant") return new AnswerView(message, () => this.retry());
    const asked = this.messages.findLastIndex(({ role }) => role === "assistant");
    this.shown[asked].showResult(this.messages.length - asked - 2, message.content); // results follow in the calls' order
    return { root: null };
  }

  cut(start) {
    for (const { root } of this.shown.splice(start)) root?.remove();
    this.messages.length = start;
  }

  /** Make a change, and stay at the end of the list if the reader is there. */
  follow(change) {
    const isNear = this.isNearEnd();
    change();
    if (isNear) this.toEnd();
  }

  isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.list;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  toEnd() {
    this.list.scrollTop = this.list.scrollHeight;
  }
}

/** Whether the model ended its message with calls that came through whole. */
function hasWholeCalls({ tool_calls: calls, note }) {
  return calls.length > 0 && note.state === "done" && note.finish !== "length";
}

/** The messages as the server takes them. An answer that was cut short counts with the text it has; half a call does
 * not. The thinking goes along: with tools in play a model reads its earlier thoughts. */
export function forServer(messages) {
  return messages.filter((message) => message.role !== "assistant" || message.content || hasWholeCalls(message))
    .map((message) => {
      const { note, reasoning_content: thoughts, tool_calls: calls, ...plain } = message;
      if (thoughts) plain.reasoning_content = thoughts;
      if (calls && hasWholeCalls(message)) plain.tool_calls = calls;
      return plain;
    });
}

function fields(model, history, { effort, names, json, instructions, temperature }) {
  const messages = instructions.trim() ? [{ role: "system", content: instructions.trim() }, ...history] : history;
  const request = { model, messages, thinking: { type: effort === "off" ? "disabled" : "enabled" } };
  if (effort !== "off") request.reasoning_effort = effort;
  if (names.length) request.tools = toolSchemas(names);
  if (json) request.response_format = { type: "json_object" };
  if (temperature !== null) request.temperature = temperature;
  return request;
}

/** Take a chunk of the stream into the message, and the time at which it came. */
function take(message, chunk, times) {
  if (chunk.usage) message.note.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  if (choice.finish_reason) message.note.finish = choice.finish_reason;
  const { delta } = choice;
  if (!delta?.reasoning_content && !delta?.content && !delta?.tool_calls?.length) return;
  times.last = performance.now();
  times.first ??= times.last;
  if (!delta.reasoning_content) times.thought ??= times.last;
  fold(message, delta);
  if (message.reasoning_content && times.thought) message.note.thinkingSeconds ??= (times.thought - times.first) / 1000;
}

function addFigures(note, times) {
  if (times.first === undefined) return;
  note.firstSeconds = (times.first - times.begin) / 1000;
  const seconds = (times.last - times.first) / 1000;
  const count = note.usage?.completion_tokens ?? 0;
  if (count > 1 && seconds >= MIN_SECONDS) note.tokensPerSecond = (count - 1) / seconds; // the first token's time is the prompt's
}
