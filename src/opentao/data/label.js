// The keyboard presses the page's own buttons; ranking collects an order. Everything else is plain forms.
"use strict";

const main = document.querySelector("main[data-kind]");
const order = [];

function press(button) {
  if (button === null || button.disabled) return;
  for (const other of document.querySelectorAll("button")) other.classList.toggle("pressed", other === button);
  button.form.requestSubmit(button);
}

function rank(place) {
  const at = order.indexOf(place);
  if (at >= 0) order.splice(at, 1);
  else order.push(place);
  for (const article of document.querySelectorAll("article")) {
    const position = order.indexOf(Number(article.dataset.place));
    article.querySelector(".place").textContent = position < 0 ? "" : `place ${position + 1}`;
    article.classList.toggle("ranked", position >= 0);
  }
  const done = document.getElementById("ranked");
  done.disabled = order.length === 0;
  done.value = order.join(",");
}

let sent = false;
document.addEventListener("submit", (event) => {
  if (sent) event.preventDefault();  // a key held down is one answer
  sent = true;
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (main !== null && main.dataset.kind === "rank" && /^[1-9]$/.test(event.key)) {
    if (Number(event.key) <= Number(main.dataset.shown)) rank(Number(event.key) - 1);
    return;
  }
  for (const button of document.querySelectorAll("button[data-keys]")) {
    if (button.dataset.keys.split(" ").includes(event.key)) {
      event.preventDefault();
      press(button);
      return;
    }
  }
});

if (main !== null && main.dataset.kind === "rank") {
  for (const article of document.querySelectorAll("article")) {
    article.querySelector("h2").addEventListener("click", () => rank(Number(article.dataset.place)));
  }
}
