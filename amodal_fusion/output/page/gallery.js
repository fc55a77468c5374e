// The gallery and the table of all scenes.

const known = value => value !== null && value !== undefined;
const number = (value, digits) => known(value) ? value.toFixed(digits) : "–";
const signed = value => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(2);

// key, title, format, whether small values are bad and come first
const COLUMNS = [
  ["psnr", "PSNR, dB", v => number(v, 2), true], ["gain", "over the best rule, dB", v => known(v) ? signed(v) : "–", true],
  ["overlap", "PSNR in overlap, dB", v => number(v, 2), true], ["oracle", "oracle, dB", v => number(v, 2), true],
  ["lpips", "LPIPS", v => number(v, 4), false], ["residual", "residual, of the hole", percent, false],
  ["undecided", "undecided, of the hole", percent, false], ["hole", "hole, of the picture", percent, false], ["count", "completions", String, false],
  ...results.map(key => [key, key.replaceAll("_", " "), v => number(v, key.endsWith("psnr") ? 2 : 4), key.endsWith("psnr")]),
].filter(([key]) => scenes.some(scene => known(scene[key])));
const has = key => COLUMNS.some(column => column[0] === key);
const tenth = Math.max(12, Math.ceil(scenes.length / 10));
const FILTERS = {
  all: {title: "All"},
  worst: {title: "Worst", sort: "psnr", ascending: true, most: tenth, tip: "the tenth with the lowest PSNR in the hole"},
  behind: {title: "Behind the best rule", sort: "gain", ascending: true, keep: s => s.gain < 0, tip: "a simple rule does better"},
  undecided: {title: "Most undecided", sort: "undecided", ascending: false, most: tenth, tip: "the tenth where no candidate has a clear majority"},
  open: {title: "Not done", keep: s => !done.has(s.id), tip: "not marked as done"},
  corrected: {title: "Corrected", keep: s => s.now.length > 0, tip: "scenes that have locks"},
  residual: {title: "Most residual", sort: "residual", ascending: false, most: tenth, tip: "the tenth that leaves most to the inpainter"},
};
const state = {filter: "all", view: "gallery", sort: "id", ascending: true};
let shown = [], drawn = 0;

const lazy = (src, properties = {}) => {
  const image = make("img", {loading: "lazy", decoding: "async", alt: "", ...properties});
  image.onerror = () => image.classList.add("missing");
  image.src = src;
  return image;
};

function card(scene) {
  const picture = make("div", {className: "picture"});
  picture.style.aspectRatio = `${scene.width} / ${scene.height}`;
  const slider = make("input", {type: "range", min: 0, max: 100, step: .1, value: 50, ariaLabel: "before and after"});
  slider.oninput = () => picture.style.setProperty("--x", slider.value + "%");
  const label = make("span"), tint = make("div", {className: "tint"}), map = make("div", {className: "map"});
  picture.append(lazy(inOutput(scene, "fused.png")), lazy(inData(scene, "partial.png"), {className: "before"}), slider,
    make("div", {className: "handle"}), map);
  const show = (src, colour, text) => () => {
    map.replaceChildren(make("img", {src, alt: ""}), tint, label);
    tint.style.background = colour || "none";
    label.textContent = text;
    picture.classList.toggle("plain", !colour);
    picture.classList.add("showing");
  };
  const strip = make("div", {className: "strip"});
  const thumb = (image, src, colour, name, text) => {
    const frame = make("i", {}, ...(image ? [lazy(image)] : []));
    frame.style.borderColor = colour || "var(--line)";
    const button = make("button", {type: "button", title: text}, frame, name);
    button.onmouseenter = button.onfocus = show(src, colour, text);
    button.onmouseleave = button.onblur = () => picture.classList.remove("showing");
    strip.append(button);
  };
  for (const {file, number, name} of scene.completions) thumb(inData(scene, file), inOutput(scene, `weight_${number}.png`),
    colourOf(scene, number), name, `weight of ${name}`);
  const residual = inOutput(scene, "residual_mask.png");
  thumb(residual, residual, "#999999", "none", "none of them: for the inpainter");
  if (scene.original) thumb(inData(scene, "original.png"), inData(scene, "original.png"), "", "truth", "original");

  const numbers = make("div", {className: "numbers"});
  const add = (title, value, className = "") => numbers.append(make("span", {}, title + " ", make("b", {className}, value)));
  if (known(scene.psnr)) add("PSNR", number(scene.psnr, 2));
  if (known(scene.gain)) add("over the best rule", signed(scene.gain), scene.gain >= 0 ? "good" : "bad");
  if (known(scene.lpips)) add("LPIPS", number(scene.lpips, 3));
  add("residual", percent(scene.residual));
  if (scene.order) add("front to back", scene.order);
  const name = make("div", {className: "name"}, make("button", {type: "button", title: scene.id, onclick: () => edit(scene)}, scene.id));
  if (done.has(scene.id)) name.append(make("span", {className: "good"}, "done"));
  if (isChanged(scene)) name.append(make("span", {className: "mark"}, "corrected"));
  name.append(make("button", {type: "button", className: "correct", textContent: "correct", onclick: () => edit(scene)}));
  if (scene.figure) name.append(make("a", {href: inOutput(scene, "figure.png"), textContent: "figure"}));
  const element = make("article", {className: "card"}, picture, make("div", {className: "text"}, name, numbers, strip));
  element.dataset.scene = scene.id;
  return element;
}

function row(scene) {
  const element = make("tr", {onclick: () => edit(scene)}, make("td", {}, lazy(inOutput(scene, "fused.png"))),
    make("td", {}, scene.id), ...COLUMNS.map(([key, , write]) => make("td", {
      className: key === "gain" && known(scene.gain) ? (scene.gain >= 0 ? "good" : "bad") : ""}, write(scene[key]))));
  element.dataset.scene = scene.id;
  return element;
}

// Scenes that need correction first: largest loss against the best rule, or, without originals, most undecided weights
function worstFirst() {
  const key = ["gain", "psnr", "undecided"].find(has);
  change({filter: "all", sort: key, ascending: key !== "undecided"});
  if ($("#editor").open) edit(shown[0]);
}

function more() { // in batches, as the user scrolls down: works with thousands of scenes
  const batch = shown.slice(drawn, drawn + 24);
  drawn += batch.length;
  (state.view === "table" ? $("tbody") : $("#gallery")).append(...batch.map(state.view === "table" ? row : card));
  return batch.length > 0;
}

function draw() {
  const {keep, most} = FILTERS[state.filter];
  const wanted = $("#search").value.normalize().toLowerCase();
  const sign = state.ascending ? 1 : -1;
  shown = scenes.filter(s => (!keep || keep(s)) && s.id.normalize().toLowerCase().includes(wanted));
  shown.sort((a, b) => {
    const [x, y] = [a[state.sort], b[state.sort]];
    if (!known(x) || !known(y)) return known(y) - known(x); // unknown values come last in both orders
    return sign * (typeof x === "string" ? x.localeCompare(y, undefined, {numeric: true}) : x - y);
  });
  if (most) shown = shown.filter(s => known(s[FILTERS[state.filter].sort])).slice(0, most);
  drawn = 0;
  $("#gallery").replaceChildren();
  $("tbody").replaceChildren();
  $("#gallery").hidden = state.view === "table";
  $("#sheet").hidden = state.view !== "table";
  $("#none").hidden = shown.length > 0;
  for (const button of document.querySelectorAll("[data-filter]")) button.ariaPressed = button.dataset.filter === state.filter;
  for (const button of document.querySelectorAll("[data-view]")) button.ariaPressed = button.dataset.view === state.view;
  for (const head of document.querySelectorAll("th"))
    head.ariaSort = head.dataset.key !== state.sort ? "none" : state.ascending ? "ascending" : "descending";
  $("#sort").value = state.sort;
  const mean = key => {
    const values = shown.map(s => s[key]).filter(known);
    return values.length ? values.reduce((a, b) => a + b) / values.length : null;
  };
  $("#facts").replaceChildren(...[["scenes", String(shown.length) + (shown.length < scenes.length ? ` of ${scenes.length}` : "")],
    ...COLUMNS.filter(([key]) => key !== "count").map(([key, title, write]) => ["mean " + title, write(mean(key))]),
  ].map(([title, value]) => make("span", {}, title + " ", make("b", {}, value))));
  more();
  watch();
}

function watch() { // a new observer reports at once whether the end of the page is visible
  observer.unobserve($("#end"));
  observer.observe($("#end"));
}
const observer = new IntersectionObserver(([entry]) => entry.isIntersecting && more() && watch(), {rootMargin: "1200px"});

function change(changes) {
  Object.assign(state, changes);
  history.replaceState(null, "", "#" + new URLSearchParams(state));
  keep();
draw();
}
const sortBy = key => change({sort: key,
  ascending: state.sort === key ? !state.ascending : key === "id" || COLUMNS.find(column => column[0] === key)[3]});

for (const [key, {title, sort, ascending, tip}] of Object.entries(FILTERS)) {
  if (sort && !has(sort)) continue;
  const button = make("button", {type: "button", textContent: title, title: tip || ""});
  button.dataset.filter = key;
  button.onclick = () => change({filter: key, ...(sort ? {sort, ascending} : {sort: "id", ascending: true})});
  $("#filters").append(button);
}
for (const button of document.querySelectorAll("[data-view]")) button.onclick = () => change({view: button.dataset.view});
for (const [key, title] of [["id", "scene"], ...COLUMNS]) $("#sort").append(make("option", {value: key, textContent: title}));
$("#sort").onchange = event => sortBy(event.target.value);
$("thead tr").append(make("th"), ...[["id", "scene"], ...COLUMNS].map(([key, title]) => {
  const head = make("th", {textContent: title, onclick: () => sortBy(key)});
  head.dataset.key = key;
  return head;
}));
$("#size").oninput = event => document.documentElement.style.setProperty("--card", event.target.value + "px");
$("#search").oninput = draw;

// report.html#filter=worst opens with this filter, #view=table&sort=lpips with the sorted table
const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const preset = FILTERS[asked.filter] ? asked.filter : "all";
state.filter = FILTERS[preset].sort && !has(FILTERS[preset].sort) ? "all" : preset;
if (FILTERS[state.filter].sort) Object.assign(state, {sort: FILTERS[state.filter].sort, ascending: FILTERS[state.filter].ascending});
if (asked.sort === "id" || has(asked.sort)) Object.assign(state, {sort: asked.sort, ascending: asked.ascending !== "false"});
if (asked.view === "table") state.view = "table";
keep();
draw();
