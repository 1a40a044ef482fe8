// The server, asked by GET alone. Every failure is one sentence.

/** JSON of `path`; parameters that are null or "" are left out, arrays repeat their name. */
export async function get(path, parameters = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") query.append(name, one);
    }
  }
  const text = query.toString();
  let answer;
  try {
    answer = await fetch(`api/${path}${text ? `?${text}` : ""}`, { signal, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The dashboard does not answer; is `polyrl dashboard` still running?");
  }
  if (answer.status === 401) throw new Error("The dashboard asks for its token again; open the link that `polyrl dashboard` printed.");
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.error ?? `The dashboard answered ${answer.status}.`);
  return body;
}

/** The part of the API about one run. */
export const ofRun = (run) => (path, parameters, signal) => get(`runs/${encodeURIComponent(run)}${path ? `/${path}` : ""}`, parameters, signal);
