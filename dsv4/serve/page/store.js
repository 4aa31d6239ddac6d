// What the page keeps. The conversation and the key last as long as this tab; theme and options stay in the browser.
// Nothing of it leaves the browser but with a request to this server.

const PREFIX = "dsv4.";

/** A value kept before, or the fallback if there is none that can be read. */
export function recall(area, name, fallback) {
  try {
    const text = window[area].getItem(PREFIX + name);
    return text === null ? fallback : JSON.parse(text);
  } catch (error) {
    if (error instanceof DOMException || error instanceof SyntaxError) return fallback;
    throw error;
  }
}

/** Keep a value as JSON (null: forget it). False if the browser keeps nothing or has no room left. */
export function keep(area, name, value) {
  try {
    if (value === null) window[area].removeItem(PREFIX + name);
    else window[area].setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch (error) {
    if (error instanceof DOMException) return false;
    throw error;
  }
}
