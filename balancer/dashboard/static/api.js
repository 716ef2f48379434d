// What is asked of the balancer. The session is a cookie that no script can read.

const LONGEST_MS = 15_000;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(method, path, body) {
  const asked = { method, cache: "no-store", credentials: "same-origin", redirect: "error", headers: {} };
  asked.signal = AbortSignal.timeout(LONGEST_MS);
  if (method !== "GET") {
    asked.headers["Content-Type"] = "application/json";
    asked.body = JSON.stringify(body ?? {});
  }
  let answer;
  try {
    answer = await fetch(`/admin${path}`, asked);
  } catch {
    throw new Refused(0, "The balancer does not answer. Trying again.");
  }
  const told = await answer.json().catch(() => null);
  if (!answer.ok) throw new Refused(answer.status, told?.error?.message ?? `The balancer answered ${answer.status}.`);
  return told;
}

// A name as a part of a path. Dots alone would lead elsewhere, whatever way they are written.
export function part(name) {
  if (name === "." || name === "..") throw new Refused(0, "A worker of this name can only be dealt with by removing it from the configuration.");
  return encodeURIComponent(name);
}
