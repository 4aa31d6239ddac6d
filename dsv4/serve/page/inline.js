// Markdown inside a line: emphasis, code, links. Builds DOM nodes from text, in about linear time; whatever is
// not understood stays text. Left out: raw HTML, references, images (shown as links: the page asks no other server).

import { element } from "./dom.js";

const SPECIAL = /[\\\n`*_~[\]!<]|https?:\/\//g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const SPACE = /\s/;
const WORD = /[\p{L}\p{N}_]/u;
const DIGIT = /[0-9]/;
const TARGET = /\( ?<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s{1,2}(?:"[^"]{0,300}"|'[^']{0,300}'))? ?\)/y;
const ANGLE_URL = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const BARE_URL = /https?:\/\/[^\s<>"`*[\]]{1,2000}/y;
const MAX_OPENERS = 32; // bounds how deep elements nest, whatever a model writes
const MAX_RUN = 3;

/** The address if it is a whole http or https one, else null. */
export function safeUrl(text) {
  if (!/^https?:/i.test(text) || !URL.canParse(text)) return null;
  return new URL(text).href;
}

/** Turn one paragraph's text into nodes. Newlines become line breaks. */
export function renderInline(text) {
  const fragment = document.createDocumentFragment();
  for (const node of new Inline(text).parse()) fragment.append(node);
  return fragment;
}

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.nodes = [];
    this.openers = []; // {mark, count, index of its text in nodes}
  }

  parse() {
    const { text } = this;
    while (this.at < text.length) {
      SPECIAL.lastIndex = this.at;
      const found = SPECIAL.exec(text);
      const next = found ? found.index : text.length;
      this.plain(text.slice(this.at, next));
      this.at = next;
      if (found) this.special(found[0]);
    }
    return this.nodes;
  }

  plain(text) {
    if (text) this.nodes.push(document.createTextNode(text));
  }

  special(mark) {
    if (mark === "\\") return this.escape();
    if (mark === "\n") return this.lineBreak();
    if (mark === "`") return this.code();
    if (mark === "*" || mark === "_" || mark === "~") return this.emphasis(mark);
    if (mark === "[" || mark === "!") return this.openBracket(mark);
    if (mark === "]") return this.closeBracket();
    return mark === "<" ? this.url(ANGLE_URL) : this.url(BARE_URL);
  }

  escape() {
    const next = this.text[this.at + 1];
    if (next === "\n") {
      this.at += 1;
    } else if (next && PUNCTUATION.test(next)) {
      this.plain(next);
      this.at += 2;
    } else {
      this.plain("\\");
      this.at += 1;
    }
  }

  lineBreak() {
    this.nodes.push(document.createElement("br"));
    this.at += 1;
    while (this.text[this.at] === " ") this.at += 1;
  }

  code() {
    const start = this.at;
    while (this.text[this.at] === "`") this.at += 1;
    const size = this.at - start;
    const end = this.endOfCode(size);
    if (end < 0) return this.plain(this.text.slice(start, this.at));
    let content = this.text.slice(this.at, end).replaceAll("\n", " ");
    if (content.startsWith(" ") && content.endsWith(" ") && content.trim()) content = content.slice(1, -1);
    this.nodes.push(element("code", { textContent: content }));
    this.at = end + size;
  }

  /** Where the next run of this length is. In vain at most once for each length, so there is no need to remember. */
  endOfCode(size) {
    const run = /`+/g;
    run.lastIndex = this.at;
    for (let found = run.exec(this.text); found; found = run.exec(this.text)) {
      if (found[0].length === size) return found.index;
    }
    return -1;
  }

  emphasis(mark) {
    const { text } = this;
    const start = this.at;
    while (text[this.at] === mark) this.at += 1;
    const count = this.at - start;
    const before = text[start - 1] ?? " ";
    const after = text[this.at] ?? " ";
    const isBetweenDigits = mark === "*" && DIGIT.test(before) && DIGIT.test(after); // 2*3*4 is a product
    const isLiteral = count > MAX_RUN || isBetweenDigits || (mark === "~" && count !== 2);
    if (isLiteral) return this.plain(text.slice(start, this.at));
    const isWord = mark === "_" && WORD.test(before) && WORD.test(after);
    const left = SPACE.test(before) || isWord ? count : this.closeRun(mark, count);
    if (!left) return;
    if (!SPACE.test(after) && !isWord) this.open(mark, left, mark.repeat(left));
    else this.plain(mark.repeat(left));
  }

  open(mark, count, text) {
    if (this.openers.length === MAX_OPENERS) this.openers.shift();
    this.openers.push({ mark, count, index: this.nodes.length });
    this.plain(text);
  }

  /** Close as much of a run as has openers, and say how many marks are left. */
  closeRun(mark, count) {
    while (count > 0) {
      const found = this.openers.findLastIndex((opener) => opener.mark === mark);
      if (found < 0) break;
      const opener = this.openers[found];
      const size = Math.min(2, count, opener.count);
      const tag = mark === "~" ? "del" : size === 2 ? "strong" : "em";
      opener.count -= size;
      count -= size;
      this.openers.length = found + 1;
      const node = this.wrap(element(tag), opener.index);
      if (opener.count) this.nodes[opener.index].data = mark.repeat(opener.count);
      else {
        this.openers.pop();
        this.nodes.splice(opener.index, 1);
      }
      this.nodes.push(node);
    }
    return count;
  }

  /** Move everything after the opener's own text into the element. */
  wrap(node, index) {
    for (const child of this.nodes.splice(index + 1)) node.append(child);
    return node;
  }

  openBracket(mark) {
    const isImage = mark === "!";
    if (isImage && this.text[this.at + 1] !== "[") {
      this.plain("!");
      this.at += 1;
      return;
    }
    const text = isImage ? "![" : "[";
    this.open("[", 1, text);
    this.at += text.length;
  }

  closeBracket() {
    const found = this.openers.findLastIndex((opener) => opener.mark === "[");
    TARGET.lastIndex = this.at + 1;
    const target = found < 0 ? null : TARGET.exec(this.text);
    const url = target && target[1].length <= 2000 ? safeUrl(target[1]) : null;
    if (!url) {
      if (found >= 0) this.openers.splice(found, 1);
      this.plain("]");
      this.at += 1;
      return;
    }
    const { index } = this.openers[found];
    this.openers.length = found;
    const node = this.wrap(link(url), index);
    for (const inner of node.querySelectorAll("a")) inner.replaceWith(...inner.childNodes);
    if (!node.textContent) node.textContent = url;
    this.nodes.splice(index, 1, node);
    this.at = TARGET.lastIndex;
  }

  url(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    const text = found ? (found[1] ?? trimmed(found[0])) : "";
    const url = safeUrl(text);
    if (url) {
      this.nodes.push(link(url, text));
      this.at += pattern === ANGLE_URL ? found[0].length : text.length;
    } else {
      this.plain(this.text[this.at]);
      this.at += 1;
    }
  }
}

/** An address without the punctuation of the sentence it stands in. */
function trimmed(url) {
  let end = url.length;
  while (end && (".,;:!?'".includes(url[end - 1]) || (url[end - 1] === ")" && !url.slice(0, end).includes("(")))) end -= 1;
  return url.slice(0, end);
}

function link(url, text = "") {
  return element("a", { href: url, title: url, target: "_blank", rel: "noopener noreferrer", textContent: text });
}
