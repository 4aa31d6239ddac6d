// How a message looks. A view is made once for a message and told to update when the message has grown; the same code
// shows an answer that streams and one that was kept.

import { copyText, element } from "./dom.js";
import { LiveMarkdown } from "./markdown.js";

const ENDS = {
  rounds: "The model asked for tools again and again; this call was not run.",
  length: "Cut off: the length limit was reached.",
  content_filter: "Held back by a filter.",
  insufficient_system_resource: "The server ran out of room for this answer.",
};

const JSON_FENCE = "```json\n"; // shown as code, to its end: JSON has no line that could close this

/** What the reader wrote. */
export function questionView(text) {
  return element("article", { className: "question" },
    element("h2", { className: "hidden", textContent: "You" }),
    element("p", { textContent: text }));
}

/** One answer of the model: its thinking, its text, its tool calls, and how it went. */
export class AnswerView {
  constructor(message, onRetry) {
    this.message = message;
    this.numShown = { thinking: 0, text: 0 };
    this.isTouched = false; // the reader has opened or closed the thinking: leave it alone from then on
    this.cards = [];
    this.waiting = element("p", { className: "waiting", textContent: "Waiting" });
    this.summary = element("summary");
    this.thoughts = element("div", { className: "thoughts" }, "");
    this.thinking = element("details", { className: "thinking", hidden: true }, this.summary, this.thoughts);
    this.summary.addEventListener("click", () => { this.isTouched = true; });
    this.text = element("div", { className: "text", ariaLive: "polite" });
    this.markdown = new LiveMarkdown(this.text);
    this.calls = element("div", { className: "calls" });
    this.problem = element("p", { className: "problem", hidden: true });
    this.figures = element("p", { className: "figures" });
    this.copy = element("button", { type: "button", className: "quiet", textContent: "Copy" });
    this.copy.addEventListener("click", () => copyText(this.message.content, this.copy));
    const retry = element("button", { type: "button", className: "quiet retry", textContent: "Retry" });
    retry.addEventListener("click", onRetry);
    this.foot = element("footer", { hidden: true }, this.figures, this.copy, retry);
    this.root = element("article", { className: "answer" }, element("h2", { className: "hidden", textContent: "Answer" }),
      this.waiting, this.thinking, this.text, this.calls, this.problem, this.foot);
    this.update();
  }

  update() {
    const { message } = this;
    const isRunning = message.note.state === "running";
    const hasBegun = Boolean(message.reasoning_content || message.content || message.tool_calls.length);
    this.waiting.hidden = !isRunning || hasBegun;
    this.updateThinking(isRunning);
    const piece = message.content.slice(this.numShown.text);
    if (piece) this.markdown.push(!this.numShown.text && message.note.isJson ? `${JSON_FENCE}${piece}` : piece);
    this.numShown.text = message.content.length;
    this.text.ariaBusy = String(isRunning); // read aloud when it is whole, not word by word
    this.updateCalls(isRunning);
    this.updateEnd(isRunning);
  }

  updateThinking(isRunning) {
    const { reasoning_content: thoughts, content, tool_calls: calls, note } = this.message;
    if (!thoughts) return;
    const isThinking = isRunning && !content.trim() && !calls.length;
    this.thinking.hidden = false;
    if (!this.isTouched) this.thinking.open = isThinking;
    const seconds = note.thinkingSeconds === undefined ? "" : ` for ${duration(note.thinkingSeconds)}`;
    this.summary.textContent = isThinking ? "Thinking" : `Thought${seconds}`;
    this.summary.classList.toggle("busy", isThinking);
    this.thoughts.firstChild.appendData(thoughts.slice(this.numShown.thinking));
    this.numShown.thinking = thoughts.length;
  }

  updateCalls(isRunning) {
    this.message.tool_calls.forEach((call, index) => {
      if (!this.cards[index]) {
        this.cards.push(new CallCard());
        this.calls.append(this.cards[index].root);
      }
      this.cards[index].update(call.function, isRunning);
    });
  }

  updateEnd(isRunning) {
    const { note, content } = this.message;
    this.root.classList.toggle("running", isRunning);
    this.foot.hidden = isRunning;
    if (isRunning) return;
    const problem = note.state === "failed" ? note.error : note.state === "stopped" ? "Stopped." : ENDS[note.finish];
    this.problem.hidden = !problem;
    this.problem.textContent = problem ?? "";
    this.problem.classList.toggle("failed", note.state === "failed");
    this.figures.replaceChildren(...figures(note).map((text) => element("span", { textContent: text })));
    this.copy.hidden = !content;
  }

  /** Show the result of the call at this index. */
  showResult(index, result) {
    this.cards[index].showResult(result);
  }
}

class CallCard {
  constructor() {
    this.name = element("strong");
    this.arguments = element("code");
    this.result = element("p", { className: "result", hidden: true });
    const head = element("p", { className: "call-name" }, element("span", { textContent: "Tool" }), " ", this.name);
    this.root = element("section", { className: "call", ariaLabel: "Tool call" }, head,
      element("pre", { tabIndex: 0, role: "region", ariaLabel: "Arguments" }, this.arguments), this.result);
  }

  update({ name, arguments: text }, isRunning) {
    this.name.textContent = name;
    this.arguments.textContent = isRunning ? text : spaced(text);
  }

  showResult(result) {
    this.result.hidden = false;
    const label = element("span", { className: "hidden", textContent: "Result: " });
    this.result.replaceChildren(label, element("code", { textContent: result }));
  }
}

/** JSON with a space after each comma and colon, on lines of its own once it is long; other text as it is. */
function spaced(text) {
  try {
    const value = JSON.parse(text);
    const lines = JSON.stringify(value, null, 2);
    return lines.length < 80 ? lines.replace(/\n */g, " ") : lines;
  } catch (error) {
    if (error instanceof SyntaxError) return text;
    throw error;
  }
}

function figures({ usage, tokensPerSecond, firstSeconds }) {
  if (!usage) return [];
  const thinking = usage.completion_tokens_details?.reasoning_tokens;
  const texts = [`${plural(usage.completion_tokens, "token")}${thinking ? `, ${thinking} thinking` : ""}`];
  if (tokensPerSecond !== undefined) texts.push(`${tokensPerSecond.toFixed(tokensPerSecond < 10 ? 1 : 0)} tokens/s`);
  if (firstSeconds !== undefined) texts.push(`first after ${duration(firstSeconds)}`);
  const hits = usage.prompt_cache_hit_tokens;
  if (hits !== undefined) texts.push(`prompt ${usage.prompt_tokens}, ${hits} from cache`);
  return texts;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

function duration(seconds) {
  if (seconds < 0.95) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 9.95 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds)} s`;
}
