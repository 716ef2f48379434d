// The workers, and the machines that wait to become some.

import { ask, part } from "./api.js";
import { byId, element, foreign, lines, list, say } from "./dom.js";

const KINDS = { ready: "good", starting: "busy", draining: "busy", unknown: "busy", busy: "busy" };

export function showRoom(room, act) {
  const waiting = room.waiting ? `, ${room.waiting} waiting` : "";
  const count = room.workers.length;
  say(byId("summary"), `${count} ${count === 1 ? "worker" : "workers"}, ${room.running} running${waiting}`);
  say(byId("warnings"), (room.warnings ?? []).join("\n"));
  byId("no-workers").hidden = room.workers.length > 0;
  list(byId("workers"), room.workers, (worker) => worker.id, (worker) => workerCard(worker.id, act));
  const removed = room.removed ?? [];
  byId("removed-section").hidden = removed.length === 0;
  list(byId("removed"), removed, (id) => id, (id) => removedRow(id, act));
}

function workerCard(id, act) {
  const name = foreign();
  const state = foreign("span", "state");
  const work = element("p");
  const models = element("ul");
  const about = foreign("p", "text hint");
  const detail = foreign("p", "text");
  const advice = element("ul", { className: "hint" });
  const drain = element("button", { type: "button" });
  const remove = element("button", { type: "button", textContent: "Remove" });
  const actions = element("div", { className: "actions" }, drain, remove);
  const node = element("li", {}, element("h3", {}, name), state, work, models, about, detail, advice, actions);
  say(name, id);
  let draining = false;
  drain.addEventListener("click", () => act({
    question: draining ? null : `Send nothing new to ${id}? What runs there may finish.`,
    control: drain,
    work: () => ask("POST", `/workers/${part(id)}/${draining ? "undrain" : "drain"}`),
    done: () => (draining ? `${id} gets requests again.` : `${id} gets nothing new.`),
  }));
  remove.addEventListener("click", () => act({
    question: `Remove ${id} from the room? What runs there may finish; nothing new is sent.`,
    control: remove,
    work: () => ask("DELETE", `/workers/${part(id)}`),
    done: (told) => `${id} is removed. ${told?.note ?? ""}`,
  }));
  function update(worker) {
    draining = worker.draining === true;
    const breaker = worker.breaker && worker.breaker !== "closed" ? `, breaker ${worker.breaker}` : "";
    say(state, `${worker.state}${breaker}${worker.stuck ? ", stuck" : ""}`);
    state.dataset.kind = KINDS[worker.state] ?? "bad";
    const speed = worker.tokens_per_second ? `, ${worker.tokens_per_second} tokens/s` : "";
    say(work, `${worker.running} of ${worker.slots} slots in use${speed}`);
    lines(models, (worker.models ?? []).map(modelLine));
    say(about, [worker.engine, worker.hardware, worker.source && `from ${worker.source}`, worker.url].filter(Boolean).join(" · "));
    say(detail, worker.detail);
    lines(advice, worker.advice ?? []);
    say(drain, draining ? "Send requests again" : "Drain");
  }
  return { node, update };
}

function modelLine(model) {
  const progress = typeof model.progress === "number" ? ` ${Math.round(100 * model.progress)} %` : "";
  const state = model.state && model.state !== "loaded" ? ` (${model.state}${progress})` : "";
  return `${(model.names ?? [model.name]).join(", ")}${state}`;
}

function removedRow(id, act) {
  const name = foreign();
  const again = element("button", { type: "button", textContent: "Let in again" });
  say(name, id);
  again.addEventListener("click", () => act({
    control: again,
    work: () => ask("POST", `/workers/${part(id)}/admit`),
    done: (told) => `${id} may come back. ${told?.note ?? ""}`,
  }));
  return { node: element("li", {}, name, " ", again), update: () => {} };
}

export function showPending(pending, act) {
  byId("pending-section").hidden = pending.length === 0;
  list(byId("pending"), pending, (agent) => agent.id, (agent) => pendingCard(agent.id, act));
}

function pendingCard(id, act) {
  const name = foreign();
  const about = foreign("p", "text hint");
  const code = element("input", { required: true, autocomplete: "off", autocapitalize: "characters", spellcheck: false, maxLength: 32 });
  const approve = element("button", { textContent: "Approve" });
  const form = element("form", { className: "code" }, element("label", {}, "Code ", code), approve);
  say(name, id);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    act({
      control: approve,
      work: () => ask("POST", `/workers/${part(id)}/approve`, { code: code.value.trim() }),
      done: () => {
        code.value = "";
        return `${id} is let in.`;
      },
    });
  });
  const update = (agent) => say(about, `${agent.url} · certificate ${agent.fingerprint}`);
  return { node: element("li", {}, element("h3", {}, name), about, form), update };
}
