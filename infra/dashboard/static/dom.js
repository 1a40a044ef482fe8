// Elements from text. What a policy wrote becomes textContent, and nothing on this page ever parses HTML.

/** h("a", {href, class, onclick}, "text", node, ...): an element. Children that are null or false are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "selected") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

// Control characters, and those that turn the direction of text: both can make a page lie about what was written.
const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]/u;

/** Text as it was written: odd characters become visible marks such as ⟨ESC⟩ or ⟨U+202E⟩. A list of nodes. */
export function visible(text) {
  const nodes = [];
  let plain = "";
  for (const character of String(text)) {
    if (!ODD.test(character)) {
      plain += character;
      continue;
    }
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
    const code = character.codePointAt(0);
    nodes.push(h("span", { class: "odd" }, code === 27 ? "⟨ESC⟩" : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`));
  }
  if (plain) nodes.push(document.createTextNode(plain));
  return nodes;
}

/** The same in one string, for titles and attributes. */
export const plain = (text) => visible(text).map((node) => node.textContent).join("");

/** The name of an environment, a run or a rollout. */
export const name = (text) => h("span", { class: "name" }, visible(text));

export const badge = (text, kind = text) => h("span", { class: `badge ${/^[a-z_]+$/.test(kind) ? kind : ""}` }, visible(text));

/** What to show where there is nothing yet; `parts` may hold code elements. */
export const empty = (...parts) => h("p", { class: "empty" }, parts);

/** A table in a box that scrolls sideways. columns: [{title, left?, cell: row => child}]. */
export function table(columns, rows, caption = "") {
  const side = (column) => (column.left || column.class === "wrap" ? "left" : null);
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption || "Table" },
    h("table", {},
      h("thead", {}, h("tr", {}, columns.map((c) => h("th", { scope: "col", class: side(c) }, c.title)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, columns.map((c) => h("td", { class: c.class ?? side(c) }, c.cell(row))))))));
}
