const PAUSE = 2000;
const stateOf = (page) => page.querySelector("meta[name=state]").content;
const live = document.getElementById("live");
let shown = stateOf(document);

// a screen reader reads it aloud each time that it is set
const say = (text) => {
  if (live.textContent !== text) live.textContent = text;
};

// what the reader has done to the page -> a function that does it to the next one
const keep = () => {
  const place = [window.scrollX, window.scrollY];
  const typed = ["search", "sort"].map((id) => [id, document.getElementById(id)?.value]);
  const open = [...document.querySelectorAll("details[open]")].map((one) => one.id);
  const moved = [...document.querySelectorAll(".wide, figure")].map((one) => one.scrollLeft);
  const held = document.activeElement;
  const caret = held?.id === "search" ? [held.selectionStart, held.selectionEnd] : null;
  const held_id = held?.closest("details")?.id || held?.id;
  const link = held?.getAttribute("href");
  return () => {
    for (const [id, value] of typed) {
      const field = document.getElementById(id);
      if (field && value !== undefined) field.value = value;
    }
    activate();
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    document.querySelectorAll(".wide, figure").forEach((one, index) => { one.scrollLeft = moved[index] || 0; });
    const links = [...document.querySelectorAll("[href]")];
    const found = held_id ? document.getElementById(held_id) : link && links.find((one) => one.getAttribute("href") === link);
    const target = found?.tagName === "DETAILS" ? found.querySelector("summary") : found;
    target?.focus({ preventScroll: true });
    if (caret) target?.setSelectionRange(...caret);
    window.scrollTo(...place);
  };
};

const refresh = async () => {
  const told = await (await fetch("state")).json();
  say("This page follows the run.");
  if (told.state === shown) return;
  const fresh = new DOMParser().parseFromString(await (await fetch("./")).text(), "text/html");
  if (stateOf(fresh) === shown) return;
  const restore = keep();
  shown = stateOf(fresh);
  document.title = fresh.title;
  for (const part of ["header", "main", "footer", "#data"]) {
    document.querySelector(part).replaceWith(fresh.querySelector(part));
  }
  restore();
};

const follow = () => refresh()
  .catch(() => say("konic report no longer answers: this is what it last said."))
  .finally(() => setTimeout(follow, PAUSE));
setTimeout(follow, PAUSE);
