// Three small tools that run in the page, so that tool calls show something true. Nothing is ever evaluated as code.

const MAX_EXPRESSION = 500; // characters; also bounds how deep brackets nest
const DIGITS = 12; // shown of a result: hides that 0.1 + 0.2 is not quite 0.3

const SCHEMAS = {
  calculator: schema("calculator", "Work out an arithmetic expression.", {
    expression: { type: "string", description: "Numbers with + - * / % ^ and brackets." },
  }),
  clock: schema("clock", "Tell the date and the time.", {}),
  lookup: schema("lookup", "Look up the value of a key.", { key: { type: "string", description: "What to look up." } }),
};

function schema(name, description, properties) {
  const parameters = { type: "object", properties, required: Object.keys(properties), additionalProperties: false };
  return { type: "function", function: { name, description, parameters } };
}

/** The tools to offer the model, by their names. */
export function toolSchemas(names) {
  return names.map((name) => SCHEMAS[name]);
}

/** Run a call of the model and give the result as text; what is wrong with a call is a result too. */
export function runTool({ name, arguments: text }, { names, table }) {
  if (!names.includes(name)) return `error: there is no tool ${name || "without a name"}`;
  let given;
  try {
    given = JSON.parse(text || "{}");
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return "error: the arguments are not JSON";
  }
  if (name === "clock") return clock(new Date());
  if (name === "lookup") return lookup(String(given?.key ?? ""), table);
  return calculate(String(given?.expression ?? ""));
}

function clock(now) {
  const two = (number) => String(number).padStart(2, "0");
  const date = `${now.getFullYear()}-${two(now.getMonth() + 1)}-${two(now.getDate())}`;
  const day = now.toLocaleDateString("en", { weekday: "long" });
  return `${day} ${date} ${two(now.getHours())}:${two(now.getMinutes())}:${two(now.getSeconds())}`;
}

/** The value of a key in lines of `key = value`; case and spaces around do not count. */
export function lookup(key, table) {
  const wanted = key.trim().toLowerCase();
  for (const line of table.split("\n")) {
    const equals = line.indexOf("=");
    if (equals > 0 && line.slice(0, equals).trim().toLowerCase() === wanted) return line.slice(equals + 1).trim();
  }
  return "not found";
}

/** The value of an arithmetic expression as text, or "error: ..." saying what is wrong with it. */
export function calculate(expression) {
  if (expression.length > MAX_EXPRESSION) return `error: more than ${MAX_EXPRESSION} characters`;
  try {
    const value = new Expression(expression).value();
    return Number.isFinite(value) ? String(Number(value.toPrecision(DIGITS))) : "error: the result is not a finite number";
  } catch (error) {
    if (error instanceof RangeError) return `error: ${error.message}`;
    throw error;
  }
}

/** Sums of products of powers, left to right; a power binds tighter than a sign before it and goes from the right. */
class Expression {
  constructor(text) {
    const plain = text.replaceAll("**", "^").replace(/[×·]/g, "*").replaceAll("÷", "/").replaceAll("−", "-");
    this.parts = plain.match(/\d[\d_]*\.?\d*(?:e[+-]?\d+)?|\.\d+|\S/gi) ?? [];
    this.at = 0;
  }

  value() {
    const value = this.sum();
    if (this.at < this.parts.length) throw new RangeError(`unexpected ${this.parts[this.at]}`);
    return value;
  }

  takes(...signs) {
    return signs.includes(this.parts[this.at]) ? this.parts[this.at++] : null;
  }

  sum() {
    let value = this.product();
    for (let sign = this.takes("+", "-"); sign; sign = this.takes("+", "-")) {
      const next = this.product();
      value = sign === "+" ? value + next : value - next;
    }
    return value;
  }

  product() {
    let value = this.signed();
    for (let sign = this.takes("*", "/", "%"); sign; sign = this.takes("*", "/", "%")) {
      const next = this.signed();
      if (sign !== "*" && next === 0) throw new RangeError("division by zero");
      value = sign === "*" ? value * next : sign === "/" ? value / next : value % next;
    }
    return value;
  }

  signed() {
    const sign = this.takes("+", "-");
    if (!sign) return this.power();
    return sign === "-" ? -this.signed() : this.signed();
  }

  power() {
    const base = this.atom();
    return this.takes("^") ? base ** this.signed() : base;
  }

  atom() {
    if (this.takes("(")) {
      const value = this.sum();
      if (!this.takes(")")) throw new RangeError("a bracket is not closed");
      return value;
    }
    const part = this.parts[this.at];
    if (part === undefined) throw new RangeError("the expression ends too early");
    const value = Number(part.replaceAll("_", ""));
    if (Number.isNaN(value)) throw new RangeError(`unexpected ${part}`);
    this.at += 1;
    return value;
  }
}
