// Markdown, block by block: headings, lists, quotes, tables, fenced code, rules, paragraphs. Safe by construction (DOM
// nodes from text, never markup) and incremental: a block is built again only while it is the last one.

import { copyText, element } from "./dom.js";
import { renderInline } from "./inline.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: +(.*))?$/s;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*))?$/s;
const TABLE_RULE = /^:?-+:?$/;
const MAX_DEPTH = 8; // quotes and lists deeper than this are shown as text

/** Markdown that grows at its end. `root` holds one child per block; push(text) after push(text) gives the same
 * elements as the whole text at once. */
export class LiveMarkdown {
  constructor(root) {
    this.root = root;
    this.tail = ""; // the text from the first block that may still change
    this.numSettled = 0;
    this.open = null; // {kind, node} of the block the tail begins with
  }

  push(text) {
    this.tail += text;
    const lines = this.tail.split("\n");
    const blocks = parseBlocks(lines, 0);
    if (!blocks.length) return;
    // Code grows in place, so that a selection or a scroll inside it stays.
    const isGrowing = blocks[0].kind === "code" && this.open?.kind === "code";
    const numKept = this.numSettled + (isGrowing ? 1 : 0);
    while (this.root.childNodes.length > numKept) this.root.lastChild.remove();
    const nodes = blocks.map((block, i) => (isGrowing && i === 0 ? growCode(this.open.node, block) : build(block)));
    this.root.append(...nodes.slice(isGrowing ? 1 : 0));
    const last = blocks.at(-1);
    // The last line may still become anything, and with it the block it seems to begin (a table's rule: the table).
    const isSettled = last.first + (last.kind === "table" ? 1 : 0) < lines.length - 1;
    if (isSettled) {
      this.numSettled += nodes.length - 1;
      this.tail = lines.slice(last.first).join("\n");
    }
    this.open = isSettled ? { kind: last.kind, node: nodes.at(-1) } : { kind: blocks[0].kind, node: nodes[0] };
  }
}

/** The blocks of some lines: {kind, first, ...}, first being the index of the line a block begins on. */
export function parseBlocks(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = parseBlock(lines, at, depth);
    block.first = at;
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function parseBlock(lines, at, depth) {
  const line = lines[at];
  const heading = HEADING.exec(line);
  if (heading) return { kind: "heading", level: heading[1].length, text: withoutHashes(heading[2] ?? ""), end: at + 1 };
  if (FENCE.test(line)) return parseFence(lines, at);
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (depth < MAX_DEPTH && QUOTE.test(line)) return parseQuote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return parseList(lines, at, depth);
  if (isTable(lines, at)) return parseTable(lines, at);
  return parseParagraph(lines, at);
}

function withoutHashes(text) {
  const bare = text.trim().replace(/#+$/, "");
  return bare === "" || bare.endsWith(" ") ? bare.trim() : text.trim();
}

function parseFence(lines, at) {
  const [, indent, marks, info] = FENCE.exec(lines[at]);
  const text = [];
  let end = at + 1;
  for (; end < lines.length; end++) {
    const line = lines[end].trim();
    if (line.length >= marks.length && line === marks[0].repeat(line.length)) break;
    text.push(indent && lines[end].startsWith(indent) ? lines[end].slice(indent.length) : lines[end]);
  }
  const isClosed = end < lines.length;
  return { kind: "code", language: info.trim().split(/\s+/)[0], text: text.join("\n"), end: isClosed ? end + 1 : end };
}

function parseQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { kind: "quote", blocks: parseBlocks(inner, depth + 1), end };
}

function isTable(lines, at) {
  if (!lines[at].includes("|") || !lines[at + 1]?.includes("-")) return false;
  const rules = cells(lines[at + 1]);
  return rules.length === cells(lines[at]).length && rules.every((rule) => TABLE_RULE.test(rule));
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function parseTable(lines, at) {
  const head = cells(lines[at]);
  const sides = cells(lines[at + 1]).map((rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : ""));
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && lines[end].trim()) rows.push(cells(lines[end++]));
  return { kind: "table", head, sides, rows, end };
}

function parseParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end += 1;
  return { kind: "paragraph", text: joined(lines.slice(at, end)), end };
}

/** Whether a line ends the paragraph above it. */
function interrupts(lines, at) {
  const line = lines[at];
  if (HEADING.test(line) || FENCE.test(line) || RULE.test(line) || QUOTE.test(line) || isTable(lines, at)) return true;
  const item = ITEM.exec(line);
  return Boolean(item && item[4] && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1));
}

function joined(lines) {
  return lines.map((line) => line.trim()).join("\n");
}

function parseList(lines, at, depth) {
  const [, indent, marker] = ITEM.exec(lines[at]);
  const base = indent.length;
  const sort = marker.at(-1);
  const items = [];
  let isLoose = false;
  let blanks = 0;
  let end = at;
  for (let next = at; next < lines.length; next++) {
    const line = lines[next].replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "));
    if (!line.trim()) {
      blanks += 1;
      continue;
    }
    const width = line.length - line.trimStart().length;
    const item = RULE.test(line) ? null : ITEM.exec(line);
    const isOurs = item && width < base + 2 && item[2].at(-1) === sort;
    const isInside = items.length && width >= base + 2 && (item || width >= items.at(-1).width);
    const isLazy = items.length && !blanks && !item && !interrupts(lines, next);
    if (!isOurs && !isInside && !isLazy) break;
    isLoose ||= blanks > 0 && items.length > 0;
    if (isOurs) items.push(newItem(item));
    else items.at(-1).lines.push(...Array(blanks).fill(""), line.slice(Math.min(width, items.at(-1).width)));
    blanks = 0;
    end = next + 1;
  }
  const start = /\d/.test(marker) ? parseInt(marker, 10) : null;
  return { kind: "list", start, isLoose, items: items.map((item) => parseBlocks(item.lines, depth + 1)), end };
}

function newItem([, indent, marker, space = " ", text = ""]) {
  const gap = space.length > 4 ? 1 : space.length;
  return { width: indent.length + marker.length + gap, lines: [" ".repeat(space.length - gap) + text] };
}

function build(block) {
  switch (block.kind) {
    case "heading":
      return element(`h${Math.min(block.level + 2, 6)}`, {}, renderInline(block.text)); // below the page's own two levels
    case "code":
      return buildCode(block);
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(build));
    case "list":
      return buildList(block);
    case "table":
      return buildTable(block);
    default:
      return element("p", {}, renderInline(block.text));
  }
}

function buildCode(block) {
  const code = element("code", { textContent: block.text });
  const copy = element("button", { type: "button", className: "quiet", textContent: "Copy" });
  copy.addEventListener("click", () => copyText(code.textContent, copy));
  const bar = element("div", { className: "code-bar" }, element("span", { textContent: block.language || "text" }), copy);
  const label = `Code, ${block.language || "text"}`;
  const pre = element("pre", { tabIndex: 0, role: "region", ariaLabel: label }, code); // scrolls sideways by keyboard
  return element("div", { className: "code" }, bar, pre);
}

function growCode(node, block) {
  const code = node.querySelector("code");
  const before = code.textContent;
  if (code.firstChild && block.text.startsWith(before)) code.firstChild.appendData(block.text.slice(before.length));
  else code.textContent = block.text;
  const label = block.language || "text";
  node.querySelector(".code-bar span").textContent = label;
  node.querySelector("pre").ariaLabel = `Code, ${label}`;
  return node;
}

function buildList({ start, isLoose, items }) {
  const list = start === null ? element("ul") : element("ol", { start });
  for (const blocks of items) {
    const children = blocks.map((block) =>
      block.kind === "paragraph" && !isLoose ? renderInline(block.text) : build(block));
    list.append(element("li", {}, ...children));
  }
  return list;
}

function buildTable({ head, sides, rows }) {
  const row = (texts, tag) => element("tr", {}, ...head.map((_, column) =>
    element(tag, { className: sides[column] }, renderInline(texts[column] ?? ""))));
  const table = element("table", {},
    element("thead", {}, row(head, "th")), element("tbody", {}, ...rows.map((texts) => row(texts, "td"))));
  return element("div", { className: "table", tabIndex: 0, role: "region", ariaLabel: "Table" }, table);
}
