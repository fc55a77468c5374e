// Apply locks to a scene: the rule of amodal_fusion/output/locks.py, on the same 16-bit weights.
// Candidates have places: 0 is the fill, 1 … N are the completions.

const ALL = -1, FULL = 65535;
const SHARE_OF_COMPLETION = 1e-3, SHARE_OF_FILL = 1e-6; // a completion takes over before the fill

// "1>3", "*>3", "0>* in 40 20 90 20 90 70" → {front, behind, polygon: [[x, y], …]}
function parseLock(text) {
  const [pair, corners] = text.split(" in ");
  const [front, behind] = pair.split(">").map(number => number.trim() === "*" ? ALL : Number(number));
  const values = corners ? corners.trim().split(/\s+/).map(Number) : [];
  const polygon = Array.from({length: values.length / 2}, (_, i) => [values[2 * i], values[2 * i + 1]]);
  return {front, behind, polygon};
}

function lockText({front, behind, polygon}) {
  const pair = [front, behind].map(number => number === ALL ? "*" : number).join(">");
  return polygon.length ? `${pair} in ${polygon.flat().join(" ")}` : pair;
}

// [front, behind] of candidates 0 … count, all pairs that locks on the whole picture decide
function pairsOf(locks, count) {
  const everywhere = locks.filter(lock => !lock.polygon.length);
  const forgotten = new Set(everywhere.filter(lock => lock.front === ALL).map(lock => lock.behind));
  const everyone = Array.from({length: count + 1}, (_, i) => i);
  const pairs = new Map();
  for (const {front, behind} of everywhere) {
    const fronts = front === ALL ? everyone.filter(i => !forgotten.has(i)) : [front];
    for (const i of fronts) for (const j of behind === ALL ? everyone : [behind]) if (i !== j) pairs.set(`${i}>${j}`, [i, j]);
  }
  return [...pairs.values()];
}

// [[behind, those in front of it], …], hindmost first; null if the pairs form a circle
function sortPairs(pairs) {
  const fronts = new Map(), behinds = new Map();
  for (const [front, behind] of pairs) {
    fronts.set(behind, [...(fronts.get(behind) || []), front]);
    behinds.set(front, [...(behinds.get(front) || []), behind]);
  }
  const sorted = [], state = new Map(); // 1: on the way to the hindmost, 2: sorted
  const visit = number => {
    if (state.get(number)) return state.get(number) === 2;
    state.set(number, 1);
    if (!(behinds.get(number) || []).every(visit)) return false;
    state.set(number, 2);
    if (fronts.has(number)) sorted.push([number, fronts.get(number)]);
    return true;
  };
  return [...fronts.keys(), ...behinds.keys()].every(visit) ? sorted : null;
}

// Pixels of the hole, as places in scene.pixels, whose centre lies in a polygon; even-odd rule
function within(polygon, scene) {
  const inside = new Uint8Array(scene.width * scene.height);
  polygon.forEach(([x, y], i) => {
    let [otherX, otherY] = polygon[(i + 1) % polygon.length];
    if (y > otherY) [x, y, otherX, otherY] = [otherX, otherY, x, y];
    const last = Math.min(scene.height, Math.ceil(otherY - 0.5));
    for (let row = Math.max(0, Math.ceil(y - 0.5)); row < last; row++) {
      const crossing = x + (row + 0.5 - y) * (otherX - x) / (otherY - y);
      for (let column = 0; column < scene.width && column + 0.5 < crossing; column++) inside[row * scene.width + column] ^= 1;
    }
  });
  return Int32Array.from(scene.everywhere.filter(p => inside[scene.pixels[p]]));
}

// Weights [0 … N] of Float64Array, one number per pixel of the hole, after the locks
function applyLocks(locks, scene) {
  const weights = scene.weights.map(weight => Float64Array.from(weight));
  takeOver(pairsOf(locks, scene.count), weights, scene, scene.everywhere);
  for (const {front, behind, polygon} of locks) {
    if (!polygon.length) continue;
    const part = within(polygon.map(([x, y]) => [x / scene.scale[0], y / scene.scale[1]]), scene);
    takeOver(pairsOf([{front, behind, polygon: []}], scene.count), weights, scene, part);
  }
  return weights;
}

// In place: at these pixels the front candidate of a pair takes the weight behind it, in proportion to its alpha
function takeOver(pairs, weights, scene, pixels) {
  const involved = new Set(pairs.map(([front]) => front));
  const shares = weights.map((weight, i) => involved.has(i) && weight.map(w => w + (i ? SHARE_OF_COMPLETION : SHARE_OF_FILL)));
  for (const [behind, fronts] of sortPairs(pairs) || []) {
    for (const p of pixels) {
      let open = 1, total = 0;
      for (const front of fronts) {
        const cover = scene.alpha[front][p] / 255;
        open *= 1 - cover;
        total += shares[front][p] * cover;
      }
      const taken = weights[behind][p] * (1 - open);
      if (taken === 0) continue;
      for (const front of fronts) weights[front][p] += taken * shares[front][p] * scene.alpha[front][p] / 255 / Math.max(total, 1e-9);
      weights[behind][p] -= taken;
    }
  }
}

// The fused picture as ImageData: the photo outside the hole, the weighted sum inside
function compose(scene, weights) {
  const picture = new ImageData(scene.base.slice(), scene.width, scene.height);
  for (const p of scene.everywhere) {
    for (let channel = 0; channel < 3; channel++) {
      let value = 0;
      for (let i = 0; i <= scene.count; i++) value += weights[i][p] * scene.colours[i][channel][p];
      picture.data[4 * scene.pixels[p] + channel] = value;
    }
  }
  return picture;
}

// Place of the candidate with the largest weight, per pixel of the hole
function winners(scene, weights) {
  return Uint16Array.from(scene.everywhere, p => {
    let best = 0;
    for (let i = 1; i <= scene.count; i++) if (weights[i][p] > weights[best][p]) best = i;
    return best;
  });
}

// OUT/<id>/page.js → a scene. Its planes are bytes, each as differences from one pixel to the next, compressed by zlib:
// mask, 3 of the photo with the hole filled, and per completion the weight's upper and lower byte, alpha and 3 colours.
async function unpack({width, height, count, scale, packed}) {
  const bytes = Uint8Array.from(atob(packed), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  let start = 0;
  const take = length => {
    const plane = planes.subarray(start, start += length);
    for (let i = 1; i < length; i++) plane[i] += plane[i - 1];
    return plane;
  };
  const mask = take(width * height), size = width * height;
  const pixels = Int32Array.from(mask.keys()).filter(pixel => mask[pixel]);
  const photo = [take(size), take(size), take(size)];
  const base = new Uint8ClampedArray(4 * size).fill(255);
  for (let i = 0; i < size; i++) for (let channel = 0; channel < 3; channel++) base[4 * i + channel] = photo[channel][i];
  const scene = {width, height, count, scale, mask, pixels, base, everywhere: Int32Array.from(pixels.keys()),
    colours: [photo.map(plane => Uint8Array.from(pixels, pixel => plane[pixel]))],
    weights: [new Float64Array(pixels.length).fill(FULL)], alpha: [new Uint8Array(pixels.length).fill(255)]};
  scene.placeOf = new Int32Array(size).fill(-1); // pixel of the picture → place in scene.pixels
  pixels.forEach((pixel, place) => scene.placeOf[pixel] = place);
  for (let i = 1; i <= count; i++) {
    const [upper, lower, alpha, ...colours] = Array.from({length: 6}, () => take(pixels.length));
    scene.weights.push(Float64Array.from(upper, (byte, p) => 256 * byte + lower[p]));
    scene.alpha.push(alpha);
    scene.colours.push(colours);
    scene.weights[i].forEach((weight, p) => scene.weights[0][p] -= weight);
  }
  for (const weight of scene.weights) weight.forEach((value, p) => weight[p] = Math.max(value, 0) / FULL);
  return scene;
}

// Corners of the patch of one winner around a pixel of the hole: [[x, y], …]
function patchAround(scene, labels, start) {
  const {width, height, placeOf} = scene, label = labels[placeOf[start]];
  const belongs = pixel => placeOf[pixel] >= 0 && labels[placeOf[pixel]] === label;
  const patch = new Set([start]), open = [start];
  while (open.length) {
    const pixel = open.pop(), x = pixel % width;
    for (const [other, exists] of [[pixel - 1, x > 0], [pixel + 1, x < width - 1], [pixel - width, pixel >= width],
      [pixel + width, pixel < width * (height - 1)]]) {
      if (exists && !patch.has(other) && belongs(other)) {
        patch.add(other);
        open.push(other);
      }
    }
  }
  let first = start;
  for (const pixel of patch) first = Math.min(first, pixel);
  // Walk along the border with the patch on the right hand, from the first pixel's upper left corner to the right.
  const inside = (x, y) => x >= 0 && x < width && patch.has(y * width + x);
  let [x, y, dx, dy] = [first % width, Math.floor(first / width), 1, 0];
  const [startX, startY] = [x, y], corners = [];
  do {
    x += dx;
    y += dy;
    const right = inside(x + (dx - dy - 1) / 2, y + (dy + dx - 1) / 2), left = inside(x + (dx + dy - 1) / 2, y + (dy - dx - 1) / 2);
    if (!right || left) {
      corners.push([x, y]);
      [dx, dy] = right ? [dy, -dx] : [-dy, dx];
    }
  } while (x !== startX || y !== startY || dx !== 1);
  return simplify(corners);
}

// A polygon of at most 48 corners that stays close to the given one (Douglas and Peucker 1973)
function simplify(corners) {
  const reduce = (points, tolerance) => {
    const [[x, y], [endX, endY]] = [points[0], points.at(-1)];
    const length = Math.hypot(endX - x, endY - y);
    let farthest = 0, most = tolerance;
    for (let i = 1; i < points.length - 1; i++) {
      const [px, py] = points[i];
      const distance = length ? Math.abs((endX - x) * (py - y) - (endY - y) * (px - x)) / length : Math.hypot(px - x, py - y);
      if (distance > most) [farthest, most] = [i, distance];
    }
    return farthest ? [...reduce(points.slice(0, farthest + 1), tolerance).slice(0, -1), ...reduce(points.slice(farthest), tolerance)]
      : [points[0], points.at(-1)];
  };
  let polygon = corners;
  for (let tolerance = 0.75; polygon.length > 48 || tolerance === 0.75; tolerance *= 1.5)
    polygon = reduce([...corners, corners[0]], tolerance).slice(0, -1);
  return polygon.length < 3 ? corners : polygon;
}
