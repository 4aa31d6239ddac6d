// Small helpers over the DOM. Nothing in this page ever turns a string into markup.

/** Make an element with properties (not attributes) and children (nodes or plain text). */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, properties);
  node.append(...children);
  return node;
}

/** Copy text, and say so on the button that asked. */
export async function copyText(text, button) {
  const label = button.textContent;
  button.textContent = (await toClipboard(text)) ? "Copied" : "Not copied";
  setTimeout(() => { button.textContent = label; }, 1500);
}

async function toClipboard(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch (error) {
      if (!(error instanceof DOMException)) throw error; // not allowed: the old way below may be
    }
  }
  // A page over plain http from another machine has no clipboard object; the old command still works there.
  const area = element("textarea", { value: text, className: "hidden", readOnly: true });
  const before = document.activeElement;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  before?.focus();
  return isCopied;
}
