// One scene, large: a click into the hole shows the candidates there, and buttons decide between them.

const {results = [], scenes, data, colours, command} = JSON.parse(document.getElementById("report").textContent);
const $ = selector => document.querySelector(selector);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const inOutput = (scene, name) => encodeURIComponent(scene.id) + "/" + name;
const inData = (scene, name) => data + "/" + encodeURIComponent(scene.id) + "/" + encodeURIComponent(name);
const percent = value => value === null || value === undefined ? "–" : (100 * value).toFixed(1) + " %";

// ---------------------------------------------------------------------------
// Decisions per scene: the locks that made its files, and the current locks. The browser stores both, and which scenes are
// done, until the files have these locks.

const store = {
  key: kind => `amodal-fusion ${kind} ${location.pathname}`,
  read(kind, nothing) {
    try {
      return JSON.parse(localStorage.getItem(this.key(kind))) || nothing;
    } catch {
      return nothing; // the browser stores nothing for pages from disk, or the entry is not ours
    }
  },
  write(kind, value) {
    try {
      localStorage.setItem(this.key(kind), JSON.stringify(value));
    } catch { /* the page works without; its corrections end with it */ }
  },
};
const kept = store.read("locks", {}), done = new Set(store.read("done", []));
for (const scene of scenes) {
  const edit = kept[scene.id];
  scene.now = edit && String(edit.from) === String(scene.locks) ? edit.to : scene.locks;
  scene.undo = [];
}
const isChanged = scene => String(scene.now) !== String(scene.locks);

function keep() {
  store.write("locks", Object.fromEntries(scenes.filter(isChanged).map(scene => [scene.id, {from: scene.locks, to: scene.now}])));
  store.write("done", [...done]);
  const changed = scenes.filter(isChanged).length;
  for (const button of document.querySelectorAll(".corrections")) button.textContent = changed ? `Corrections (${changed})` : "Corrections";
}

function decide(scene, locks) {
  scene.undo.push(scene.now);
  scene.now = locks;
  keep();
}

const entryOf = (scene, number) => scene.completions.find(entry => entry.number === number);
const nameOf = (scene, number) => number === 0 ? "the fill" : number === ALL ? "all others" : entryOf(scene, number).name;
const colourOf = (scene, number) => number ? colours[scene.completions.indexOf(entryOf(scene, number)) % colours.length] : "#808080";

function inWords(scene, text) {
  const {front, behind, polygon} = parseLock(text);
  const where = polygon.length ? ", in a region" : "";
  if (behind === ALL && front === 0) return "none of them" + (where || " anywhere");
  if (front === ALL) return `${nameOf(scene, behind)} is forgotten${where}`;
  if (front === 0) return `${nameOf(scene, behind)} is never used${where}`;
  return `${nameOf(scene, front)} in front of ${nameOf(scene, behind)}${where}`;
}

// Locks with a new one. It replaces earlier ones that contradict it: those of the same pair, and the oldest ones that form
// a circle with it.
function withLock(scene, text) {
  const added = parseLock(text), numbers = [added.front, added.behind];
  const contradicts = old => String(old.polygon) === String(added.polygon) &&
    ((old.front === added.behind && old.behind === added.front) || (old.front === added.front && old.behind === added.behind) ||
     (added.front === ALL && [old.front, old.behind].includes(added.behind)) || (old.front === ALL && numbers.includes(old.behind)));
  const locks = scene.now.filter(other => !contradicts(parseLock(other)));
  const circle = () => !sortPairs(pairsOf([...locks, text].map(parseLock), Math.max(...scene.completions.map(entry => entry.number))));
  while (!added.polygon.length && circle()) locks.splice(locks.findIndex(other => !parseLock(other).polygon.length), 1);
  return [...locks, text];
}

// Locks with numbers of completions → with their places 1 … N
function inPlaces(scene, texts) {
  const place = number => number > 0 ? scene.completions.indexOf(entryOf(scene, number)) + 1 : number;
  return texts.map(parseLock).map(lock => ({...lock, front: place(lock.front), behind: place(lock.behind)}));
}

// ---------------------------------------------------------------------------
// Pixels of scenes: page.js beside the pictures calls `receive`. The last three opened scenes stay in memory.

const received = new Map(), waiting = new Map();

function receive(id, packed) {
  waiting.get(id)?.(unpack(packed));
}

function load(scene) {
  if (!received.has(scene.id)) {
    received.set(scene.id, new Promise((resolve, reject) => {
      waiting.set(scene.id, resolve);
      const script = make("script", {src: inOutput(scene, "page.js")});
      script.onload = script.onerror = () => {
        script.remove();
        waiting.delete(scene.id);
        reject(new Error(`${scene.id}/page.js is missing: run the inference script again with --report`));
      };
      document.head.append(script);
    }));
    if (received.size > 3) received.delete(received.keys().next().value);
  }
  return received.get(scene.id);
}

// ---------------------------------------------------------------------------
// The scene that is open

const open = {scene: null, pixels: null, weights: null, labels: null, at: -1, region: null, drawn: false, view: "fused"};
const VIEWS = {fused: "Fused", network: "Without locks", partial: "Partial", winners: "Winners", original: "Original"};

async function edit(scene) {
  Object.assign(open, {scene, pixels: null, at: -1, region: null, drawn: false, view: "fused"});
  const dialog = $("#editor");
  if (!dialog.open) dialog.showModal();
  $("#scene-name").textContent = scene.id;
  $("#frame").style.setProperty("--shape", scene.width / scene.height);
  $("#frame").style.aspectRatio = `${scene.width} / ${scene.height}`;
  $("#truth").src = scene.original ? inData(scene, "original.png") : "";
  $("#panel").replaceChildren("…");
  show();
  try {
    const pixels = await load(scene);
    if (open.scene !== scene) return; // another scene was opened meanwhile
    open.pixels = pixels;
  } catch (error) {
    $("#panel").replaceChildren(make("p", {className: "bad"}, error.message));
    return;
  }
  for (const canvas of [$("#picture"), $("#lines")]) Object.assign(canvas, {width: open.pixels.width, height: open.pixels.height});
  recompose();
  const next = shown[shown.indexOf(scene) + 1];
  if (next) load(next).catch(() => {}); // an error is shown when the scene is opened
}

function recompose() {
  if (!open.pixels) return;
  open.weights = applyLocks(inPlaces(open.scene, open.scene.now), open.pixels);
  open.labels = winners(open.pixels, open.weights);
  show();
}

function show() {
  const {scene, pixels, view} = open;
  $("#views-of-scene").replaceChildren(...Object.entries(VIEWS).filter(([key]) => key !== "original" || scene.original).map(([key, title]) =>
    make("button", {type: "button", textContent: title, ariaPressed: key === view, onclick: () => { open.view = key; show(); }})));
  $("#place").textContent = `${shown.indexOf(scene) + 1} of ${shown.length}`;
  $("#done").ariaPressed = done.has(scene.id);
  $("#undo").disabled = !scene.undo.length;
  $("#truth").hidden = view !== "original";
  if (!pixels || !open.weights) return;
  $("#picture").getContext("2d").putImageData(pictureOf(view), 0, 0);
  drawLines();
  showPanel();
}

function pictureOf(view) {
  const {scene, pixels, weights, labels} = open;
  if (view === "network") return compose(pixels, applyLocks([], pixels));
  if (view === "fused" || view === "original") return compose(pixels, weights);
  const picture = new ImageData(pixels.base.slice(), pixels.width, pixels.height);
  pixels.pixels.forEach((pixel, p) => {
    const place = labels[p], colour = view === "partial" ? "#000000" : place ? colours[(place - 1) % colours.length] : "#808080";
    for (let channel = 0; channel < 3; channel++) picture.data[4 * pixel + channel] = parseInt(colour.slice(1 + 2 * channel, 3 + 2 * channel), 16);
  });
  return picture;
}

// Outlines of the candidates at the chosen pixel, in their colours, and of the region
function drawLines() {
  const {scene, pixels, at, region} = open, pen = $("#lines").getContext("2d");
  pen.clearRect(0, 0, pixels.width, pixels.height);
  if (at >= 0) {
    scene.completions.forEach((entry, i) => {
      const alpha = pixels.alpha[i + 1];
      if (!alpha[at]) return;
      const covers = pixel => pixels.placeOf[pixel] >= 0 && alpha[pixels.placeOf[pixel]] >= 128;
      pen.fillStyle = colourOf(scene, entry.number);
      for (const p of pixels.everywhere) {
        const pixel = pixels.pixels[p];
        if (covers(pixel) && ![1, -1, pixels.width, -pixels.width].every(step => covers(pixel + step)))
          pen.fillRect(pixel % pixels.width, Math.floor(pixel / pixels.width), 1, 1);
      }
    });
  }
  if (region) {
    const path = new Path2D();
    region.forEach(([x, y], i) => i ? path.lineTo(x, y) : path.moveTo(x, y));
    path.closePath();
    for (const [style, dash] of [["#000", []], ["#fff", [3, 3]]]) {
      pen.strokeStyle = style;
      pen.setLineDash(dash);
      pen.stroke(path);
    }
  }
}

function showPanel() {
  const {scene, pixels, weights, at, region} = open;
  const left = pixels.everywhere.filter(p => open.labels[p] === 0).length / Math.max(1, pixels.pixels.length);
  const parts = [make("p", {className: "soft"}, `${percent(left)} of the hole is left to the inpainting model`)];
  if (at < 0 && !region) parts.push(make("p", {}, "Click into the hole to see what could be there. Draw around a region to decide about it alone."));
  else parts.push(choices());
  if (scene.now.length) {
    parts.push(make("h3", {}, "Decided"), make("ul", {className: "decided"}, ...scene.now.map((text, i) => make("li", {title: text},
      inWords(scene, text), make("button", {type: "button", title: "take this back", textContent: "×",
        onclick: () => { decide(scene, scene.now.filter((_, other) => other !== i)); recompose(); }})))));
  }
  if (pixels.scale[0] > 1.001) parts.push(make("p", {className: "soft"},
    `Large scene, shown at ${pixels.width} × ${pixels.height}. The script corrects it at its own size.`));
  $("#panel").replaceChildren(...parts);
}

// The candidates at the chosen pixel or in the drawn region, largest weight first
function candidates() {
  const {scene, pixels, weights, at, region} = open;
  const places = at >= 0 ? [at] : within(region, pixels);
  const mean = i => places.length ? places.reduce((sum, p) => sum + weights[i][p], 0) / places.length : 0;
  return [0, ...scene.completions.map((_, i) => i + 1)]
    .filter(i => i === 0 || places.some(p => pixels.alpha[i][p]))
    .map(i => ({number: i ? scene.completions[i - 1].number : 0, weight: mean(i)}))
    .sort((a, b) => b.weight - a.weight);
}

function choices() {
  const {scene} = open, found = candidates(), winner = found[0].number;
  const only = make("input", {type: "checkbox", id: "only", checked: open.drawn, onchange: event => { open.drawn = event.target.checked; }});
  const list = make("ol", {className: "candidates"});
  for (const [i, {number, weight}] of found.entries()) {
    const entry = number && entryOf(scene, number), colour = colourOf(scene, number);
    const thumb = make("i", {}, ...(entry ? [make("img", {src: inData(scene, entry.file), alt: ""})] : []));
    thumb.style.borderColor = colour;
    const bar = make("div", {className: "bar"});
    bar.style.cssText = `width: ${100 * weight}%; background: ${colour}`;
    const item = make("li", {}, thumb, make("div", {}, make("b", {}, `${i + 1}. ${entry ? entry.name : "none of them"}`), " ",
      make("span", {className: "soft"}, entry && entry.name !== `comp${number}` ? `${number} · ` : "", percent(weight)), bar, buttons(number, winner, found)));
    item.dataset.number = number;
    list.append(item);
  }
  return make("div", {}, list, make("label", {className: "soft"}, only, " decide for the dashed region only"));
}

function buttons(number, winner, found) {
  const row = make("div", {className: "row"});
  const button = (textContent, title, text, everywhere) => row.append(make("button", {type: "button", textContent, title, onclick: () => act(text, everywhere)}));
  if (number === 0) {
    button("None of these here", "the region is left to the inpainting model (x)", "0>*", false);
    return row;
  }
  if (winner && number !== winner) button(`In front of ${nameOf(open.scene, winner)}`, "where both cover a pixel", `${number}>${winner}`, true);
  else if (!winner) button("Use it", "in front of the fill", `${number}>0`, true);
  const others = found.filter(other => other.number && other.number !== number && (other.number !== winner || number === winner));
  if (others.length) {
    const select = make("select", {ariaLabel: "in front of", onchange: () => act(`${number}>${select.value}`, true)},
      make("option", {value: "", textContent: "in front of …"}), ...others.map(other => make("option", {value: other.number, textContent: nameOf(open.scene, other.number)})));
    row.append(select);
  }
  button("Forget", "others take its place", `*>${number}`, true);
  return row;
}

// Add a lock: on the whole picture, or on the region if the box is checked
function act(pair, everywhere) {
  const {scene, pixels, region} = open;
  if (region && region.length < 3) return;
  const polygon = (!everywhere || open.drawn) && region ? region.flatMap(([x, y]) => [Math.round(x * pixels.scale[0]), Math.round(y * pixels.scale[1])]) : [];
  decide(scene, withLock(scene, polygon.length ? `${pair} in ${polygon.join(" ")}` : pair));
  recompose();
}

function undo() {
  const {scene} = open;
  if (!scene.undo.length) return;
  scene.now = scene.undo.pop();
  keep();
  recompose();
}

function step(by) {
  const next = shown[shown.indexOf(open.scene) + by];
  if (next) edit(next);
}

function toggleDone() {
  const {scene} = open;
  if (!done.delete(scene.id)) done.add(scene.id);
  keep();
  if (done.has(scene.id)) step(1);
  show();
}

function download(name, content) {
  const link = make("a", {href: URL.createObjectURL(content), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function savePicture() {
  if (!open.pixels) return;
  const canvas = make("canvas", {width: open.pixels.width, height: open.pixels.height});
  canvas.getContext("2d").putImageData(compose(open.pixels, open.weights), 0, 0);
  canvas.toBlob(blob => download(`${open.scene.id}_fused.png`, blob));
}

// Mouse and finger: a tap chooses a pixel and its patch, a stroke draws a region.
let stroke = null;
const cornerAt = event => {
  const box = $("#lines").getBoundingClientRect(), {width, height} = open.pixels;
  const at = (value, from, length, size) => Math.max(0, Math.min(size, Math.round((value - from) / length * size * 2) / 2));
  return [at(event.clientX, box.left, box.width, width), at(event.clientY, box.top, box.height, height)];
};
$("#lines").onpointerdown = event => {
  if (!open.pixels) return;
  $("#lines").setPointerCapture(event.pointerId);
  stroke = {corners: [cornerAt(event)], from: [event.clientX, event.clientY], moved: false};
};
$("#lines").onpointermove = event => {
  if (!stroke) return;
  stroke.moved ||= Math.hypot(event.clientX - stroke.from[0], event.clientY - stroke.from[1]) > 8;
  if (!stroke.moved) return;
  stroke.corners.push(cornerAt(event).map(Math.round));
  Object.assign(open, {at: -1, region: stroke.corners, drawn: true});
  drawLines();
};
$("#lines").onpointerup = () => {
  if (!stroke) return;
  const {corners, moved} = stroke;
  stroke = null;
  if (moved) {
    const region = simplify([corners[0].map(Math.round), ...corners.slice(1)]);
    // the script refuses fewer than three corners, and a line has no pixels to decide about
    if (region.length < 3 || !within(region, open.pixels).length) Object.assign(open, {region: null, drawn: false});
    else open.region = region;
  } else choose(...corners[0].map(Math.floor));
  show();
};
$("#lines").onpointercancel = () => { stroke = null; };

function choose(x, y) {
  const {pixels} = open;
  const pixel = Math.min(y, pixels.height - 1) * pixels.width + Math.min(x, pixels.width - 1), at = pixels.placeOf[pixel];
  Object.assign(open, {at, region: at >= 0 ? patchAround(pixels, open.labels, pixel) : null, drawn: false});
}

// ---------------------------------------------------------------------------
// Output: locks.yaml of all scenes, and the command that applies it

function locksYaml() {
  const lines = scenes.filter(scene => scene.now.length).map(scene => {
    const words = scene.now.map(text => inWords(scene, text)).join("; ").replace(/[\r\n\u0085\u2028\u2029]/g, " ");
    return `${JSON.stringify(scene.id)}: ${JSON.stringify(scene.now)}  # ${words}\n`;
  });
  return lines.length ? lines.join("") : "{}\n";
}

const applyCommand = () => `${command || "python amodal_fusion_transformer_inference.py --data_dir DATA --output_dir OUT --report"} --locks locks.yaml`;

function showLocks() {
  $("#yaml").textContent = locksYaml();
  $("#command").textContent = applyCommand();
  $("#locks").showModal();
}

function copyFrom(selector) {
  getSelection().selectAllChildren($(selector)); // selected text can be copied by hand if the browser refuses
  navigator.clipboard?.writeText($(selector).textContent).catch(() => document.execCommand("copy"));
}

for (const button of document.querySelectorAll(".corrections")) button.onclick = showLocks;
$("#copy-yaml").onclick = () => copyFrom("#yaml");
$("#copy-command").onclick = () => copyFrom("#command");
$("#save-yaml").onclick = () => download("locks.yaml", new Blob([locksYaml()], {type: "text/yaml"}));
for (const dialog of document.querySelectorAll("dialog")) dialog.onclick = event => event.target === dialog && dialog.close();
for (const button of document.querySelectorAll("[data-close]")) button.onclick = () => button.closest("dialog").close();
$("#previous").onclick = () => step(-1);
$("#next").onclick = () => step(1);
$("#done").onclick = toggleDone;
$("#undo").onclick = undo;
$("#save-picture").onclick = savePicture;
$("#editor").onclose = () => draw(); // cards show corrected and finished scenes

// Keys. In an open scene the place of a candidate in the list puts it in front
const KEYS = {ArrowRight: () => step(1), n: () => step(1), ArrowLeft: () => step(-1), p: () => step(-1), d: toggleDone, u: undo,
  s: savePicture, x: () => open.region && act("0>*", false)};
addEventListener("keydown", event => {
  if (event.target.matches("input[type=search], select") || $("#locks").open || event.altKey) return;
  if ((event.ctrlKey || event.metaKey) && event.key !== "z") return;
  if (event.key === "w") worstFirst();
  else if (!$("#editor").open) {
    if (event.key === "Enter" && event.target === document.body && shown.length) edit(shown.find(scene => !done.has(scene.id)) || shown[0]);
    return;
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
  else if (/^[1-9]$/.test(event.key) && (open.at >= 0 || open.region)) {
    const found = candidates(), [chosen, winner] = [found[event.key - 1], found[0]];
    if (chosen?.number && chosen !== winner) act(`${chosen.number}>${winner.number}`, true);
  } else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
});
