
"use strict";
const STALE_AFTER = 10000;
const at = (id) => document.getElementById(id);
let heardAt = Date.now();

function made(tag, text, tone) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (tone) element.className = tone;
  return element;
}

function figure({label, value, note, tone}) {
  const box = made("div", "", tone);
  box.append(made("dt", label), made("dd", value), made("dd", note));
  return box;
}

function fill(body, rows) {
  const labels = [...body.parentElement.querySelectorAll("th")].map((head) => head.textContent);
  body.replaceChildren(...rows.map((cells) => {
    const row = made("tr", "");
    row.append(...cells.map(({text, href, tone}, column) => {
      const cell = made("td", href ? "" : text, tone);
      cell.dataset.label = labels[column];
      if (href) {
        const link = made("a", text);
        link.href = href;
        cell.append(link);
      }
      return cell;
    }));
    return row;
  }));
}

function show(view) {
  document.title = `${view.state} - letta-ingest`;
  at("health").className = view.state;
  for (const id of ["headline", "at", "followed_note"]) {
    if (at(id).textContent !== view[id]) at(id).textContent = view[id];
  }
  at("reasons").replaceChildren(...view.reasons.map((reason) => made("li", reason)));
  at("figures").replaceChildren(...view.figures.map(figure));
  for (const id of ["followed", "newest", "logged"]) fill(at(id), view[id]);
}

function live(text, tone) {
  at("live").textContent = text;
  at("live").className = tone ? `verdict ${tone}` : "";
}

const events = new EventSource("/events");
events.onmessage = (message) => {
  heardAt = Date.now();
  show(JSON.parse(message.data));
  live("live", "good");
};
events.onerror = () => {
  if (events.readyState === EventSource.CLOSED) live("not live: load it again", "warn");
};
setInterval(() => {
  const silent = Date.now() - heardAt;
  if (silent > STALE_AFTER) live(`the worker has said nothing for ${Math.round(silent / 1000)} s`, "bad");
}, 1000);
