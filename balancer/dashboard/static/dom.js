// What is shown. Words of others (names, details, faults) become text and nothing else: no markup is ever
// made of a string here.

export const byId = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

// Isolated: letters that are written from right to left turn nothing round beside them.
export const foreign = (name = "bdi", className = "text") => element(name, { className, dir: "auto" });

// Only where it differs, so that what somebody has selected stays so.
export function say(node, text) {
  const said = text === undefined || text === null ? "" : String(text);
  if (node.textContent !== said) node.textContent = said;
}

// One child for each item, kept over rounds with what is typed into it. `make(item)` gives a node and what
// brings that up to date.
export function list(parent, items, keyOf, make) {
  const known = parent.known ?? (parent.known = new Map());
  const wanted = new Map(items.map((item) => [keyOf(item), item]));
  for (const [key, { node }] of known) {
    if (!wanted.has(key)) {
      node.remove();
      known.delete(key);
    }
  }
  let at = parent.firstElementChild;
  for (const [key, item] of wanted) {
    let shown = known.get(key);
    if (!shown) known.set(key, (shown = make(item)));
    if (shown.node === at) at = at.nextElementSibling;
    else parent.insertBefore(shown.node, at);
    shown.update(item);
  }
}

export function lines(parent, texts) {
  list(parent, texts.map((text, number) => ({ text, number })), (one) => one.number, () => {
    const words = foreign();
    return { node: element("li", {}, words), update: (one) => say(words, one.text) };
  });
}
