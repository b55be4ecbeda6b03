// The review: marks of masks, kept in this browser by the run's id, saved as CSV or JSON, and loaded again.
(() => {
  const bar = document.getElementById("marking");
  if (!bar) return;
  const RUN = bar.dataset.run;
  const PLACE = `vlsm.marks.${RUN}`;
  const find = (id) => document.getElementById(id);
  const say = (text) => (find("said").textContent = text);
  const list = find("cards");
  const verdict = find("verdict");
  const { viewer } = gallery;

  // --- the marks: a map of [image_id, prompt, mask_digest] as JSON to {mark, time}
  let marks = new Map();
  const undone = []; // earlier marks, for undo
  const read = () => {
    try {
      const stored = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
      marks = new Map(Object.entries(stored).filter(([, value]) => markFiles.isMark(value)));
    } catch {
      say("This browser keeps no marks: save them as a file before you close the page.");
    }
  };
  const write = () => {
    try {
      localStorage.setItem(PLACE, JSON.stringify(Object.fromEntries(marks)));
    } catch {
      say("This browser keeps no more marks: save them as a file before you close the page.");
    }
  };

  const items = [...document.querySelectorAll("li[data-row]")];
  const keyOf = (item) => JSON.stringify(JSON.parse(item.dataset.row));
  const byKey = new Map(); // a mask may be a card and a large case
  for (const item of items) byKey.set(keyOf(item), [...(byKey.get(keyOf(item)) ?? []), item]);

  const press = (group, mark) => {
    for (const button of group.querySelectorAll("[data-mark]"))
      button.setAttribute("aria-pressed", String(button.dataset.mark === mark));
  };
  const paint = () => {
    const counts = { accept: 0, redo: 0, reject: 0 };
    let others = marks.size;
    for (const [key, group] of byKey) {
      const mark = marks.get(key)?.mark;
      if (mark) {
        counts[mark] += 1;
        others -= 1;
      }
      for (const item of group) {
        if (mark) item.dataset.mark = mark;
        else delete item.dataset.mark;
        press(item, mark);
      }
    }
    const number = counts.accept + counts.redo + counts.reject;
    find("progress").max = byKey.size || 1;
    find("progress").value = number;
    find("marked").textContent = `${number} of ${byKey.size} marked`;
    find("numbers").textContent =
      `${counts.accept} accepted, ${counts.redo} redo, ${counts.reject} rejected` +
      (others ? `; ${others} of masks that are not on this page` : "");
    const shown = gallery.shown()?.closest("li");
    if (shown?.dataset.row) press(verdict, shown.dataset.mark);
    gallery.draw();
  };
  const put = (key, value) => {
    read(); // another tab may have marked something
    if (value) marks.set(key, value);
    else marks.delete(key);
    write();
    paint();
  };
  const now = () => new Date().toISOString();

  // --- the current card, and where the keys lead
  let current = null;
  const columns = () => {
    const visible = [...list.querySelectorAll("li:not([hidden])")];
    const top = visible[0]?.offsetTop;
    return Math.max(1, visible.filter((item) => item.offsetTop === top).length);
  };
  const choose = (item, isFocused = true) => {
    current?.classList.remove("current");
    current = item ?? null;
    if (!current) return;
    current.classList.add("current");
    if (!isFocused) return;
    const covered = parseFloat(getComputedStyle(bar).top) + bar.offsetHeight; // by the bar, at the top of the window
    current.style.scrollMarginTop = `${covered + 12}px`;
    current.querySelector(".open").focus({ preventScroll: true });
    current.scrollIntoView({ block: "nearest", behavior: "instant" });
  };
  const next = (item, by) => {
    let found = gallery.neighbour(item, by);
    if (!found && by > 0 && item.closest("ul") === list && !gallery.more.hidden) {
      gallery.more.click();
      found = gallery.neighbour(item, by);
    }
    return found;
  };
  const move = (by) => {
    if (!current || current.hidden) return choose(list.querySelector("li:not([hidden])"));
    const found = next(current, by) ?? (Math.abs(by) > 1 ? undefined : current);
    if (found) choose(found);
  };
  const begin = () => choose(list.querySelector("li[data-row]:not([hidden]):not([data-mark])") ?? list.querySelector("li:not([hidden])"));

  const mark = (item, name, goesOn) => {
    if (!item.dataset.row) return say("This row has no mask to mark.");
    const key = keyOf(item);
    undone.push([key, marks.get(key), item]);
    const following = goesOn && next(item, 1); // before a filter hides this one
    put(key, name && { mark: name, time: now() });
    say("");
    if (!following) return;
    if (viewer.open) gallery.show(following.querySelector(".open"));
    if (following.closest("ul") === list) choose(following, !viewer.open);
  };
  const undo = () => {
    const last = undone.pop();
    if (!last) return say("There is nothing to undo.");
    const [key, before, item] = last;
    put(key, before);
    if (viewer.open) gallery.show(item.querySelector(".open"));
    if (item.closest("ul") === list && !item.hidden) choose(item, !viewer.open);
  };

  // --- outline and zoom
  const outline = () => {
    const isPlain = document.body.classList.toggle("plain");
    for (const button of document.querySelectorAll("[data-do=outline]"))
      button.setAttribute("aria-pressed", String(!isPlain));
  };
  let zoom = 1;
  const zoomTo = (level, x, y) => {
    const box = gallery.pictures;
    const picture = box?.querySelector("img");
    zoom = picture ? level : 1;
    box?.classList.remove("zoomed"); // its size without a zoom counts
    if (zoom === 1) return;
    const { naturalWidth, naturalHeight, offsetWidth, offsetHeight } = picture;
    const scale = zoom * Math.min(offsetWidth / naturalWidth, offsetHeight / naturalHeight);
    box.style.setProperty("--width", `${Math.round(naturalWidth * scale)}px`);
    box.classList.add("zoomed");
    box.scrollLeft = x * picture.offsetWidth - box.clientWidth / 2;
    box.scrollTop = y * picture.offsetHeight - box.clientHeight / 2;
  };
  // the middle of the mask, as shares of the picture
  const middle = () => {
    const layer = gallery.pictures?.querySelector(".layer");
    const box = layer?.querySelector("path").getBBox();
    if (!box?.width) return [0.5, 0.5];
    return [(box.x + box.width / 2) / layer.viewBox.baseVal.width, (box.y + box.height / 2) / layer.viewBox.baseVal.height];
  };
  const zoomOn = (x, y) => zoomTo(zoom >= 4 ? 1 : zoom * 2, x, y);
  // where a point of the window is in a picture that is fitted into its box
  const place = (picture, event) => {
    const box = picture.getBoundingClientRect();
    const scale = Math.min(box.width / picture.naturalWidth, box.height / picture.naturalHeight) || 1;
    const share = (at, from, room, size) => Math.min(1, Math.max(0, (at - from - (room - size) / 2) / size));
    return [
      share(event.clientX, box.left, box.width, picture.naturalWidth * scale),
      share(event.clientY, box.top, box.height, picture.naturalHeight * scale),
    ];
  };
  let drag = null;
  const shown = find("shown");
  shown.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, y: event.clientY, far: 0 };
  });
  shown.addEventListener("pointermove", (event) => {
    if (!drag || event.pointerType !== "mouse" || !event.buttons || zoom === 1) return;
    gallery.pictures.scrollBy({ left: drag.x - event.clientX, top: drag.y - event.clientY, behavior: "instant" });
    drag = { x: event.clientX, y: event.clientY, far: drag.far + Math.abs(event.movementX) + Math.abs(event.movementY) };
  });
  shown.addEventListener("click", (event) => {
    const picture = event.target.closest(".pictures > *")?.closest(".frame, img");
    if (!picture || drag?.far > 5) return;
    zoomOn(...place(picture.matches("img") ? picture : picture.querySelector("img"), event));
  });

  // --- files
  // one mark for an image and a prompt: the latest, if the mask was made again
  const rows = () => {
    const latest = new Map();
    for (const [key, { mark, time }] of marks) {
      const [image_id, prompt, mask_digest] = JSON.parse(key);
      const name = JSON.stringify([image_id, prompt]);
      if (!(latest.get(name)?.time > time)) latest.set(name, { run_id: RUN, image_id, prompt, mark, time, mask_digest });
    }
    return [...latest.keys()].sort().map((name) => latest.get(name));
  };
  const save = (ending, type, text) => {
    read();
    if (!marks.size) return say("There are no marks to save yet.");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text(rows(), RUN)], { type }));
    link.download = `marks-${RUN.slice(0, 8)}.${ending}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`${rows().length} marks are saved in ${link.download}.`);
  };
  const load = async (file) => {
    try {
      const found = markFiles.parse((await file.text()).replace(/^\ufeff/, ""), RUN);
      const digests = new Map([...byKey.keys()].map((key) => [JSON.stringify(JSON.parse(key).slice(0, 2)), JSON.parse(key)[2]]));
      read();
      for (const { image_id, prompt, mark, time, mask_digest } of found) {
        const digest = mask_digest || digests.get(JSON.stringify([image_id, prompt])) || "";
        const key = JSON.stringify([image_id, prompt, digest]);
        const value = { mark, time: new Date(time || now()).toISOString() };
        if (!(marks.get(key)?.time > value.time)) marks.set(key, value); // the later mark counts
      }
      write();
      paint();
      say(`${found.length} marks are loaded from ${file.name}.`);
    } catch (error) {
      say(`${file.name} is not loaded: ${error.message}.`);
    }
  };

  // --- buttons and keys
  for (const item of list.children) {
    if (!item.dataset.row) continue;
    const group = document.createElement("div");
    group.className = "verdict";
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "Mark of this mask");
    group.append(find("buttons").content.cloneNode(true));
    item.append(group);
  }
  verdict.append(find("buttons").content.cloneNode(true));
  const actions = {
    outline,
    undo,
    zoom: () => zoomOn(...middle()),
    csv: () => save("csv", "text/csv", markFiles.asCsv),
    json: () => save("json", "application/json", markFiles.asJson),
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do], [data-mark]:not(li)");
    if (!button) return;
    if (button.dataset.do) return actions[button.dataset.do]();
    const item = button.closest("li") ?? gallery.shown().closest("li");
    const isSet = button.getAttribute("aria-pressed") === "true";
    if (item.closest("ul") === list) choose(item, false);
    mark(item, isSet ? null : button.dataset.mark, viewer.open && !isSet);
  });
  list.addEventListener("focusin", (event) => {
    if (event.target.matches(".open")) choose(event.target.closest("li"), false);
  });
  const onKey = (event) => {
    const isTyping = event.target.closest("input:not([type=file]), select, textarea");
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const name = { a: "accept", r: "redo", x: "reject" }[key];
    const steps = { ArrowLeft: -1, k: -1, ArrowRight: 1, j: 1, ArrowUp: -columns(), ArrowDown: columns() };
    const open = viewer.open && gallery.shown().closest("li");
    const isInGallery = current && !current.hidden;
    if (name && open) mark(open, name, true);
    else if (name && isInGallery) mark(current, name, true);
    else if (name) begin();
    else if (key === "u") undo();
    else if (key === "o") outline();
    else if (key === "z" && open) zoomOn(...middle());
    else if (key === "z" && isInGallery) gallery.show(current.querySelector(".open"));
    else if (key in steps && !open && (isInGallery || key === "j" || key === "k")) move(steps[key]);
    else return;
    event.preventDefault();
  };
  document.addEventListener("keydown", onKey);
  gallery.onShow = (item) => {
    zoomTo(1);
    verdict.hidden = !item.dataset.row;
    press(verdict, item.dataset.mark);
    if (item.closest("ul") === list) choose(item, false);
  };
  find("size").addEventListener("input", (event) => (list.dataset.size = event.target.value));
  find("load").addEventListener("change", async (event) => {
    if (event.target.files[0]) await load(event.target.files[0]);
    event.target.value = ""; // the same file may be loaded again
  });
  document.querySelector(".load").addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") find("load").click();
  });
  window.addEventListener("storage", (event) => {
    if (event.key !== PLACE) return;
    read();
    paint();
  });
  bar.hidden = false;
  const tally = bar.querySelector(".tally");
  new ResizeObserver(() => bar.style.setProperty("--above", `${-tally.offsetTop + 6}px`)).observe(bar);
  list.dataset.size = "medium";
  read();
  paint();
})();
