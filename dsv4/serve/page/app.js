// The page's controls: what the reader types, presses and chooses. The conversation itself is in chat.js.

import { Chat } from "./chat.js";
import { element } from "./dom.js";
import { keep, recall } from "./store.js";
import { ServerError } from "./stream.js";

const EFFORTS = ["off", "high", "max"];
const TABLE = "price of tea = 3 euros\ncapital of France = Paris\ncolour of the door = green";

const at = (id) => document.getElementById(id);
const prompt = at("prompt");
const tools = [...document.querySelectorAll("input[name=tool]")];
const efforts = [...document.querySelectorAll("input[name=effort]")];
let key = recall("sessionStorage", "key", "");

function settings() {
  return {
    effort: efforts.find((radio) => radio.checked).value,
    names: tools.filter((box) => box.checked).map((box) => box.value),
    table: at("table").value,
    json: at("json").checked,
    instructions: at("instructions").value,
    temperature: Number.isNaN(at("temperature").valueAsNumber) ? null : at("temperature").valueAsNumber,
    key,
  };
}

function restoreSettings() {
  const { effort, names = [], table, json, instructions, temperature } = recall("localStorage", "options", {});
  for (const radio of efforts) radio.checked = radio.value === (EFFORTS.includes(effort) ? effort : "high");
  for (const box of tools) box.checked = names.includes(box.value);
  at("table").value = table ?? TABLE;
  at("json").checked = json ?? false;
  at("instructions").value = instructions ?? "";
  at("temperature").value = temperature ?? "";
  showCount();
}

function keepSettings() {
  keep("localStorage", "options", { ...settings(), key: undefined });
  showCount();
}

/** How much is switched on behind the Options button. */
function showCount() {
  const { names, json, instructions, temperature } = settings();
  const count = names.length + [json, instructions.trim(), temperature !== null].filter(Boolean).length;
  at("options-button").textContent = count ? `Options (${count})` : "Options";
}

function showChat(chat) {
  const isRunning = chat.running !== null;
  const hadFocus = document.activeElement === at(isRunning ? "send" : "stop");
  at("send").hidden = isRunning;
  at("stop").hidden = !isRunning;
  if (hadFocus) at(isRunning ? "stop" : "send").focus(); // a hidden button would lose it
  at("new").disabled = !chat.messages.length;
  at("welcome").hidden = chat.messages.length > 0;
  at("status").textContent = statusText(chat.messages.at(-1), isRunning);
  if (chat.model) {
    const { id, context_length: length } = chat.model;
    at("model").replaceChildren(id);
    if (length) at("model").append(element("span", { textContent: ` · ${length.toLocaleString("en")} tokens` }));
    document.title = `${id} · dsv4`;
  }
  showNotice(chat.isKept ? "" : "This browser keeps nothing more: a reload would lose the conversation.");
}

function statusText(message, isRunning) {
  if (isRunning) return "The model is answering.";
  const ends = { done: "The answer is complete.", stopped: "Stopped.", failed: "The answer failed." };
  return ends[message?.note?.state] ?? "";
}

function showNotice(text) {
  at("notice").hidden = !text;
  at("notice").textContent = text;
}

function askForKey() {
  at("key-form").hidden = false;
  at("key").focus();
}

async function ask() {
  const text = prompt.value.trim();
  if (!text || chat.running) return;
  prompt.value = "";
  fit();
  setOptions(false);
  await chat.ask(text);
}

/** As tall as its text; the style sheet sets the bounds. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function setOptions(isOpen) {
  at("options").hidden = !isOpen;
  at("options-button").ariaExpanded = String(isOpen);
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** The other colours. Back at the system's own, the page follows the system again. */
function switchTheme() {
  const theme = isDark() ? "light" : "dark";
  const isSystem = matchMedia(`(prefers-color-scheme: ${theme})`).matches;
  if (isSystem) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  keep("localStorage", "theme", isSystem ? null : theme);
  showTheme();
}

function showTheme() {
  at("theme").ariaPressed = String(isDark());
}

async function loadModel() {
  try {
    await chat.loadModel();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (error.status === 401) askForKey();
    else showNotice(error.message);
  }
}

restoreSettings();
const chat = new Chat(at("list"), { settings, onChange: showChat, onKeyNeeded: askForKey });
showChat(chat);
showTheme();
fit();
chat.toEnd();
loadModel();

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: Enter chooses a character
  event.preventDefault();
  ask();
});
prompt.addEventListener("input", fit);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (chat.running) {
    chat.stop();
  } else if (!at("options").hidden) {
    setOptions(false);
    at("options-button").focus();
  }
});
at("stop").addEventListener("click", () => chat.stop());
at("new").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});
at("options-button").addEventListener("click", () => setOptions(at("options").hidden));
for (const part of [at("options"), at("effort")]) part.addEventListener("input", keepSettings);
for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", () => {
    for (const box of tools) box.checked ||= box.value === button.dataset.tool;
    keepSettings();
    prompt.value = button.textContent;
    ask();
    prompt.focus();
  });
}
at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  keep("sessionStorage", "key", key);
  at("key").value = "";
  at("key-form").hidden = true;
  prompt.focus();
  if (chat.messages.at(-1)?.note?.state === "failed") await chat.retry();
  else await loadModel();
});
at("theme").addEventListener("click", switchTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
let isAtEnd = true;
at("list").addEventListener("scroll", () => {
  isAtEnd = chat.isNearEnd();
  at("jump").hidden = isAtEnd;
});
// The options, a tall prompt or a phone's keyboard take room from the list: stay at its end.
new ResizeObserver(() => { if (isAtEnd) chat.toEnd(); }).observe(at("list"));
at("jump").addEventListener("click", () => chat.toEnd());
addEventListener("beforeunload", () => chat.stop()); // else the cut connection would read as the server's failure
addEventListener("pagehide", () => chat.save());
