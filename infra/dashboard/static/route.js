// The address holds the whole view: #/runs, #/compare?run=a&run=b, #/run/<id>/<view>?name=value.

export function parse(hash = location.hash) {
  const [path, query] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const parts = path.split("/").map(decode);
  const parameters = new URLSearchParams(query ?? "");
  if (parts[0] === "run" && parts[1]) return { run: parts[1], view: parts[2] || "curves", parameters };
  return { run: null, view: parts[0] === "compare" ? "compare" : "runs", parameters };
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a link cut in the middle of an escape
  }
}

/** The address of a view. */
export function link(run, view, parameters = {}) {
  const query = parameters instanceof URLSearchParams ? parameters : new URLSearchParams();
  if (query !== parameters) {
    for (const [name, value] of Object.entries(parameters)) {
      for (const one of Array.isArray(value) ? value : [value]) if (one !== null && one !== undefined && one !== "") query.append(name, one);
    }
  }
  const text = query.toString();
  return `#/${run === null ? view : `run/${encodeURIComponent(run)}/${view}`}${text ? `?${text}` : ""}`;
}

/** Change some parameters of the view that is shown; null removes one. Typing replaces the entry of the history. */
export function update(changes, replace = false) {
  const { run, view, parameters } = parse();
  for (const [name, value] of Object.entries(changes)) {
    parameters.delete(name);
    for (const one of Array.isArray(value) ? value : [value]) if (one !== null && one !== "") parameters.append(name, one);
  }
  const address = link(run, view, parameters);
  if (address === location.hash) return;
  if (replace) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
  window.dispatchEvent(new Event("addresschange"));
}
