"use strict";
// Browsers open six connections to one host: up to four cameras are streams, more are pictures that follow one another.
const STREAMS = 4;
const figures = new Map();
const byId = (id) => document.getElementById(id);

function element(kind, text, className) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString();
const address = (camera, what) => `/watch/cameras/${encodeURIComponent(camera)}/${what}`;

function figure(camera) {
  const whole = element("figure");
  const button = element("button");
  button.type = "button";
  button.setAttribute("aria-label", `Enlarge ${camera}`);
  const image = element("img");
  image.alt = `${camera}: no picture yet`;
  button.append(image);
  button.addEventListener("click", () => { whole.classList.toggle("large"); show(); });
  const caption = element("figcaption");
  const parts = { state: element("span"), rate: element("span"), age: element("span"), drops: element("span"),
                  tracks: element("span"), words: element("span", "", "words") };
  caption.append(element("strong", camera), ...Object.values(parts));
  whole.append(button, caption);
  byId("cameras").append(whole);
  return { camera, whole, image, parts, mode: "" };
}

// A stream that ended, or a picture that failed, is asked for again by and by.
function follow(found, mode) {
  if (found.mode === mode) return;
  found.mode = mode;
  const again = (wait) => setTimeout(() => {
    if (figures.get(found.camera) === found && found.mode === mode)
      found.image.src = `${address(found.camera, mode)}?${Date.now()}`;
  }, wait);
  found.image.onload = () => { found.image.alt = found.camera; if (mode === "picture") again(200); };
  found.image.onerror = () => again(2000);
  again(0);
}

function show() {
  const all = [...figures.values()];
  const large = all.filter((found) => found.whole.classList.contains("large"));
  const streams = new Set([...large, ...all.filter((found) => !large.includes(found))].slice(0, STREAMS));
  const many = all.length > STREAMS;
  for (const found of all)
    follow(found, !many || (large.includes(found) && streams.has(found)) ? "stream" : "picture");
}

function cameras(list) {
  const names = new Set(list.map((status) => status.camera));
  for (const [camera, found] of figures)
    if (!names.has(camera)) { figures.delete(camera); found.image.removeAttribute("src"); found.whole.remove(); }
  for (const status of list) {
    if (!figures.has(status.camera)) figures.set(status.camera, figure(status.camera));
    const { parts } = figures.get(status.camera);
    parts.state.textContent = status.state;
    parts.state.className = status.state;
    parts.rate.textContent = `${status.fps.toFixed(1)} fps`;
    parts.age.textContent = `age ${Math.round(status.age_p50_ms)} / ${Math.round(status.age_p99_ms)} ms`;
    parts.age.title = "half of the frames, and all but one in a hundred, were younger when they were analysed";
    parts.drops.textContent = `${status.drops} dropped`;
    parts.tracks.textContent = `${status.tracks} tracks`;
    parts.words.textContent = status.words;
  }
  show();
}

function identities(list) {
  const cards = list.map((card) => {
    const made = element("div", undefined, "identity");
    const line = element("p");
    line.append(element("b", `#${card.identity} `), element("span", card.cameras.join(" → ") || "–"),
                element("span", ` ${clock(card.first)} – ${clock(card.last)}`));
    if (card.ambiguous) line.append(element("span", " ambiguous", "ambiguous"));
    made.append(line);
    if (card.words) made.append(element("p", card.words));
    const crops = element("div", undefined, "crops");
    card.crops.forEach((crop, index) => {
      const image = element("img");
      image.src = `/watch/identities/${card.identity}/${index}?${crop.time}`;
      image.alt = `#${card.identity} on ${crop.camera}`;
      image.title = `${crop.camera}, ${clock(crop.time)}` + (crop.score ? `, similarity ${crop.score.toFixed(2)}` : "");
      crops.append(image);
    });
    made.append(crops);
    return made;
  });
  byId("identities").replaceChildren(...(cards.length ? cards : [element("p", "none yet", "none")]));
}

function rows(place, heads, list) {
  const table = element("table");
  const head = element("tr");
  head.append(...heads.map((text) => element("th", text)));
  table.append(head);
  for (const values of list) {
    const row = element("tr");
    row.append(...values.map((value) => value instanceof Node ? value : element("td", value)));
    table.append(row);
  }
  place.replaceChildren(table);
}

function counts(list) {
  if (!list.length) return;
  const number = (found, kind) => found[kind] === undefined ? "" : String(found[kind]);
  rows(byId("counts"), ["where", "in", "out", "entered", "inside"], list.map((found) => [
    `${found.where} (${found.camera})`, number(found, "in"), number(found, "out"), number(found, "enter"),
    found.enter === undefined ? "" : String(found.inside)]));
}

const VERBS = { in: "crossed in", out: "crossed out", enter: "entered", leave: "left", dwell: "stays in" };

function events(list) {
  if (!list.length) return;
  byId("events").replaceChildren(...list.slice(0, 100).map((event) => {
    const made = element("li");
    const who = event.identity ? `#${event.identity}` : `track ${event.track}`;
    const long = event.seconds ? ` (${event.seconds.toFixed(1)} s)` : "";
    made.append(element("time", clock(event.time)), ` ${who} ${VERBS[event.kind]} ${event.where}${long}, ${event.camera}`);
    return made;
  }));
}

function sinks(list) {
  rows(byId("sinks"), ["sink", "state", "written", "dropped"], list.map((sink) => {
    const state = element("td", sink.state, sink.state);
    state.title = sink.words;
    return [sink.name, state, String(sink.written), String(sink.dropped + sink.stale + sink.lost)];
  }));
}

let shown = "";

async function refresh() {
  const summary = byId("summary");
  try {
    const answer = await fetch("/watch/state", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    const state = await answer.json();
    cameras(state.cameras);
    const known = JSON.stringify(state.identities);  // pictures are not asked for again while nothing changes
    if (known !== shown) { identities(state.identities); shown = known; }
    counts(state.counts);
    events(state.events);
    sinks(state.sinks);
    const live = state.cameras.filter((status) => status.state === "live").length;
    summary.textContent = `${live} of ${state.cameras.length} cameras live, ${clock(state.time)}`;
    summary.className = "";
  } catch (fault) {
    summary.textContent = `no connection: ${fault.message}`;
    summary.className = "bad";
  }
  setTimeout(refresh, 1000);
}

refresh();
