"use strict";
// The gallery's filters and order, and the viewer. All text is set as text: names come from anywhere.
const gallery = { onShow: () => {} }; // for review.js
(() => {
  const viewer = document.getElementById("viewer");
  const shown = document.getElementById("shown");
  let current = null;

  const show = (button) => {
    const item = button.closest("li");
    const pictures = document.createElement("div");
    pictures.className = "pictures";
    for (const part of button.querySelectorAll(":scope > :not(.title)")) pictures.append(part.cloneNode(true));
    gallery.pictures = pictures;
    const title = document.createElement("h2");
    title.textContent = button.querySelector(".title").textContent;
    const texts = [...item.querySelectorAll(".keys, .facts")].map((part) => part.cloneNode(true));
    shown.replaceChildren(pictures, title, ...texts);
    current = button;
    if (!viewer.open) viewer.showModal();
    viewer.scrollTop = 0;
    gallery.onShow(item);
  };
  const neighbour = (item, by) => {
    const items = [...item.closest("ul").querySelectorAll("li:not([hidden])")];
    return items[items.indexOf(item) + by];
  };
  const step = (by) => {
    const next = neighbour(current.closest("li"), by);
    if (next) show(next.querySelector(".open"));
  };
  Object.assign(gallery, { show, neighbour, viewer, shown: () => current });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.open");
    if (button) show(button);
    else if (event.target === viewer) viewer.close();
  });
  viewer.addEventListener("close", () => current && current.focus());
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "k") step(-1);
    if (event.key === "ArrowRight" || event.key === "j") step(1);
  });
  document.getElementById("close").addEventListener("click", () => viewer.close());
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));

  const controls = document.getElementById("controls");
  if (!controls) return;
  const list = document.getElementById("cards");
  const cards = [...list.children].map((item) => ({
    item,
    title: item.querySelector(".title").textContent,
    words: JSON.parse(item.dataset.words),
    numbers: JSON.parse(item.dataset.numbers),
  }));
  const wordsOf = (card, name) => [card.words[name] ?? []].flat(); // a mask may have several reasons for a review
  const selects = [...controls.querySelectorAll("select[data-word]")];
  for (const select of selects) {
    const values = new Set(cards.flatMap((card) => wordsOf(card, select.dataset.word)));
    for (const value of [...values].sort()) select.add(new Option(value, value));
  }
  const ranges = [...controls.querySelectorAll("[data-number]")].map((field) => ({
    name: field.dataset.number,
    inputs: field.querySelectorAll("input"),
  }));
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const marks = document.getElementById("marks"); // of a review
  const bound = (input) => (input.value === "" ? null : Number(input.value));

  const inRange = (card, { name, inputs: [from, to] }) => {
    const [low, high] = [bound(from), bound(to)];
    if (low === null && high === null) return true;
    const value = card.numbers[name];
    return value !== undefined && (low === null || value >= low) && (high === null || value <= high);
  };
  const matches = (card) =>
    selects.every((select) => !select.value || wordsOf(card, select.dataset.word).includes(select.value)) &&
    ranges.every((range) => inRange(card, range)) &&
    (!marks?.value || marks.value === (card.item.dataset.row ? card.item.dataset.mark ?? "unmarked" : "")) &&
    `${card.title}\n${card.words.prompt ?? ""}`.toLowerCase().includes(search.value.trim().toLowerCase());

  const ordered = () => {
    const descending = sort.value.startsWith("-");
    const name = sort.value.replace("-", "");
    if (!name) return cards;
    if (name === "title") return [...cards].sort((one, other) => (one.title < other.title ? -1 : 1));
    const missing = cards.filter((card) => card.numbers[name] === undefined);
    const present = cards.filter((card) => card.numbers[name] !== undefined);
    present.sort((one, other) => (one.numbers[name] - other.numbers[name]) * (descending ? -1 : 1));
    return [...present, ...missing];
  };
  const STEP = 60; // cards at once: a phone shows two beside each other
  const more = document.getElementById("more");
  let limit = STEP;
  const draw = () => {
    const order = ordered();
    const found = order.filter(matches);
    const visible = new Set(found.slice(0, limit));
    for (const card of cards) card.item.hidden = !visible.has(card);
    // an element that is moved loses the focus
    if (order.some((card, index) => list.children[index] !== card.item)) list.append(...order.map((card) => card.item));
    more.hidden = found.length <= limit;
    document.getElementById("count").textContent = found.length
      ? `${found.length} of ${cards.length}`
      : `none of ${cards.length} fits these filters: widen or clear one`;
  };
  const update = () => {
    limit = STEP;
    draw();
  };
  more.addEventListener("click", () => {
    limit += STEP;
    draw();
  });
  Object.assign(gallery, { draw, more });
  controls.addEventListener("input", update);
  marks?.addEventListener("input", update);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("reset", () => setTimeout(update));
  controls.hidden = false;
  update();
})();
