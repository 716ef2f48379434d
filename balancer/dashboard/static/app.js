// Signing in and out, looking again every two seconds, and carrying out what is clicked.

import { showAudit, showCluster, showConfiguration } from "./about.js";
import { ask, Refused } from "./api.js";
import { byId, say } from "./dom.js";
import { showPending, showRoom } from "./room.js";

const INTERVAL_MS = 2_000;

let timer = 0;
let looking = false;
let signedIn = false;
let troubled = false; // the notice is about the last look

// The key leaves the address bar, and with it the history, before anything else is done.
function keyFromAddress() {
  if (!location.hash) return "";
  const key = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
  history.replaceState(null, "", location.pathname + location.search);
  return key;
}

function notice(text, isBad = false) {
  const node = byId("notice");
  say(node, text);
  node.className = isBad ? "bad text" : "text";
}

function showSigned(isIn) {
  const changes = isIn !== signedIn || byId("room").hidden === byId("sign-in").hidden;
  signedIn = isIn;
  byId("sign-in").hidden = isIn;
  byId("room").hidden = !isIn;
  byId("sign-out").hidden = !isIn;
  if (!isIn) {
    say(byId("summary"), "");
    hideInvitation();
    if (changes) byId("key").focus();
  }
}

async function signIn(key) {
  try {
    await ask("POST", "/session", { key });
    notice("");
    await look();
  } catch (error) {
    notice(error.message, true);
    showSigned(false);
  }
}

async function signOut() {
  try {
    await ask("DELETE", "/session");
    notice("Signed out.");
  } catch (error) {
    notice(error.message, true);
    return;
  }
  showSigned(false);
}

const VIEWS = [
  ["/workers", (told) => showRoom(told, act)],
  ["/cluster", (told) => { showPending(told.pending, act); showCluster(told, act); }],
  ["/config", showConfiguration],
  ["/audit?limit=50", showAudit],
];

async function look() {
  if (looking) return;
  looking = true;
  clearTimeout(timer);
  const answers = await Promise.allSettled(VIEWS.map(([path]) => ask("GET", path)));
  looking = false;
  const refusals = answers.filter((one) => one.status === "rejected").map((one) => one.reason);
  if (refusals.some((one) => one.status === 401)) {
    if (signedIn) notice("The session has ended: sign in again.");
    showSigned(false);
    return;
  }
  if (refusals.length < answers.length) showSigned(true);
  answers.forEach((one, number) => { if (one.status === "fulfilled") VIEWS[number][1](one.value); });
  if (refusals.length) notice(refusals[0].message, true);
  else if (troubled) notice("");
  troubled = refusals.length > 0;
  if (!document.hidden) timer = setTimeout(look, INTERVAL_MS);
}

// One click: asked about where it may cost something, done once, told of.
async function act({ question, control, work, done }) {
  if (question && !(await agreed(question))) return;
  control.disabled = true;
  try {
    notice(done(await work()));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    notice(error.message, true);
    troubled = false;
    if (error.status === 401) showSigned(false);
  } finally {
    control.disabled = false;
  }
  look();
}

function agreed(question) {
  const dialog = byId("question");
  say(byId("question-text"), question);
  return new Promise((resolve) => {
    const leave = new AbortController();
    const answer = (yes) => { leave.abort(); dialog.close(); resolve(yes); };
    byId("question-yes").addEventListener("click", () => answer(true), { signal: leave.signal });
    byId("question-no").addEventListener("click", () => answer(false), { signal: leave.signal });
    dialog.addEventListener("cancel", () => answer(false), { signal: leave.signal });
    dialog.showModal();
    byId("question-no").focus();
  });
}

function hideInvitation() {
  say(byId("invitation-text"), "");
  byId("invitation").hidden = true;
  byId("invite").hidden = false;
}

function showInvitation(told) {
  say(byId("invitation-text"), told.command);
  byId("invitation").hidden = false;
  byId("invite").hidden = true;
  byId("invitation-text").focus();
  return "";
}

async function copyInvitation() {
  const node = byId("invitation-text");
  try {
    await navigator.clipboard.writeText(node.textContent);
    notice("Copied.");
  } catch { // browsers give the clipboard to https and localhost only
    getSelection().selectAllChildren(node);
    notice("Selected: copy it with the keyboard.");
  }
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  byId("key").value = "";
  signIn(key);
});
byId("sign-out").addEventListener("click", signOut);
byId("invite").addEventListener("click", () => act({ control: byId("invite"), work: () => ask("POST", "/cluster/invite"), done: showInvitation }));
byId("hide-invitation").addEventListener("click", () => { hideInvitation(); byId("invite").focus(); });
byId("copy-invitation").addEventListener("click", copyInvitation);
document.addEventListener("visibilitychange", () => { if (!document.hidden && signedIn) look(); });
addEventListener("hashchange", () => { const key = keyFromAddress(); if (key) signIn(key); });

const key = keyFromAddress();
if (key) signIn(key);
else look();
