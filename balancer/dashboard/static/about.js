// The configuration, the cluster and the last changes.

import { ask, part } from "./api.js";
import { byId, element, foreign, lines, list, say } from "./dom.js";

const SHOWN_RECORDS = 50;

export function showConfiguration(told) {
  const status = told.status;
  const broken = status.state !== "ok";
  const node = byId("configuration");
  const file = told.file ? told.file : "no file: defaults, variables and flags";
  const since = broken && status.since ? ` since ${status.since}` : "";
  say(node, broken ? `${file} cannot be used${since}. What was read before stays in force.` : `${file} is in force.`);
  node.className = broken ? "bad text" : "text";
  const faults = status.faults.map(faultLine);
  const later = told.needs_restart;
  lines(byId("faults"), later.length ? [...faults, `From the next start on: ${later.join(", ")}`] : faults);
}

function faultLine(fault) {
  const place = fault.line ? `line ${fault.line}, column ${fault.column ?? 1}: ` : "";
  return `${place}${fault.message}`;
}

// Who came and was not let in. Where only the certificate is another one, the machine may have been set up anew.
export function showCluster(told, act) {
  const others = told.mismatches.map((one) => ({ ...one, anew: true }));
  list(byId("strangers"), [...others, ...told.turned_away], (one) => `${one.id} ${one.url}`, (one) => strangerRow(one, act));
}

function strangerRow({ id, anew }, act) {
  const words = foreign();
  const node = element("li", {}, words);
  if (anew) {
    const forget = element("button", { type: "button", textContent: "It was set up anew" });
    forget.addEventListener("click", () => act({
      question: `Forget the certificate of ${id}? The next machine of that name that holds the cluster key is taken for it.`,
      control: forget,
      work: () => ask("DELETE", `/cluster/agents/${part(id)}`),
      done: () => `The certificate of ${id} is forgotten.`,
    }));
    node.append(" ", forget);
  }
  return { node, update: (one) => say(words, `${one.id} at ${one.url}: ${one.reason}`) };
}

export function showAudit(told) {
  const records = (told.records ?? []).slice(0, SHOWN_RECORDS);
  list(byId("audit"), records.map((record, number) => ({ record, number })), (one) => one.number, () => {
    const words = foreign();
    const time = element("time", { className: "hint" });
    return {
      node: element("li", {}, time, " ", words),
      update: ({ record }) => {
        say(time, record.at);
        const named = Object.values(record.targets ?? {}).join(", ");
        const by = record.who ? `by ${record.who}` : "";
        const refused = record.refused ? `(${record.refused})` : "";
        say(words, [record.status, refused, record.method, record.route, named, by, record.from && `from ${record.from}`].filter(Boolean).join(" "));
      },
    };
  });
}
