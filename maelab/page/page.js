"use strict";
// ABOUT is in about.js: what there is to know of each model. Their weights, and onnxruntime-web, are in scripts that
// set ASSETS, since a page that is opened from the disk may read no other files.
const $ = (id) => document.getElementById(id);
const make = (kind, text = "") => Object.assign(document.createElement(kind), { textContent: text });
const groups = [...new Set(ABOUT.models.map((model) => model.group))];
const state = { group: groups[0], image: null, hidden: [], order: [], says: {} };
window.maelab = state; // what the page shows, in numbers
const shownModels = () => ABOUT.models.filter((model) => model.group === state.group);
const lead = () => shownModels().find((model) => model.rebuilds) ?? shownModels()[0]; // its patches are hidden
const gridOf = (model) => [model.height / model.patch, model.width / model.patch];

// ------------------------------------------------------------------------------------------------ weights and runtime

async function bytesOf(name) {
  await new Promise((resolve, reject) => {
    const script = Object.assign(make("script"), { src: `${name}.js`, onload: resolve });
    script.onerror = () => reject(new Error(`${name}.js is missing beside this page`));
    document.head.append(script);
  });
  const [length, letters] = ASSETS[name]; // 15 bits a letter, from U+1000 on
  delete ASSETS[name];
  const packed = new Uint8Array(length);
  for (let i = 0, at = 0, held = 0, bits = 0; at < length; i++) {
    held = (held << 15) | (letters.charCodeAt(i) - 0x1000);
    for (bits += 15; bits >= 8 && at < length; held &= (1 << bits) - 1) packed[at++] = held >> (bits -= 8);
  }
  const opened = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(opened).arrayBuffer());
}

let runtime;
async function startRuntime() {
  const [code, wasm] = await Promise.all([bytesOf("runtime-code"), bytesOf("runtime-wasm")]);
  const ort = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  Object.assign(ort.env.wasm, { wasmBinary: wasm.buffer, numThreads: 1 });
  return ort;
}

const sessions = {};
const sessionOf = (model) => (sessions[model.asset] ??= (async () => {
  const [ort, content] = await Promise.all([(runtime ??= startRuntime()), bytesOf(model.asset)]);
  return ort.InferenceSession.create(content);
})());

// -------------------------------------------------------------------------------- images, as Pillow and maelab do them

// Bicubic and antialiased (a = -0.5), rounded after each direction. `pixels`: bytes of `channels` a pixel; `from`, `size`:
// the part of a row to take, which may begin and end within a pixel.
function resizeRows(pixels, width, height, channels, from, size, out) {
  const scale = size / out, wide = Math.max(1, scale), result = new Uint8ClampedArray(out * height * channels);
  const cubic = (x) => (x = Math.abs(x), x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0);
  for (let x = 0; x < out; x++) {
    const centre = from + (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - 2 * wide + 0.5)), last = Math.min(width, Math.trunc(centre + 2 * wide + 0.5));
    const weights = [];
    for (let i = first; i < last; i++) weights.push(cubic((i - centre + 0.5) / wide));
    const total = weights.reduce((a, b) => a + b, 0);
    for (let y = 0; y < height; y++)
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        for (let i = first; i < last; i++) sum += pixels[(y * width + i) * channels + c] * weights[i - first];
        result[(y * out + x) * channels + c] = Math.floor(sum / total + 0.5);
      }
  }
  return result;
}

function turn(pixels, width, height, channels) { // rows become columns
  const result = new Uint8ClampedArray(pixels.length);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < channels; c++) result[(x * height + y) * channels + c] = pixels[(y * width + x) * channels + c];
  return result;
}

function resize(pixels, width, height, channels, box, outWidth, outHeight) {
  const [left, top, boxWidth, boxHeight] = box;
  const narrow = resizeRows(pixels, width, height, channels, left, boxWidth, outWidth);
  const turned = resizeRows(turn(narrow, outWidth, height, channels), height, outWidth, channels, top, boxHeight, outHeight);
  return turn(turned, outHeight, outWidth, channels);
}

// The image at the model's size, in its colours: bytes (H, W, C). Once for each image and model: it may be large.
const fitted = new WeakMap();
function fit(image, model) {
  if (!fitted.has(image)) fitted.set(image, new Map());
  const known = fitted.get(image);
  if (!known.has(model)) known.set(model, fitNow(image, model));
  return known.get(model);
}

function fitNow({ data, width, height }, model) {
  const channels = model.channels, pixels = new Uint8ClampedArray(width * height * channels);
  for (let i = 0; i < width * height; i++)
    if (channels === 1) pixels[i] = (19595 * data[4 * i] + 38470 * data[4 * i + 1] + 7471 * data[4 * i + 2] + 0x8000) >> 16;
    else for (let c = 0; c < 3; c++) pixels[3 * i + c] = data[4 * i + c];
  const [w, h] = [model.width, model.height];
  if (width === w && height === h) return pixels;
  if (model.resize === "crop") {
    const wider = width / height >= w / h;
    const [boxWidth, boxHeight] = wider ? [height * w / h, height] : [width, width * h / w];
    return resize(pixels, width, height, channels, [(width - boxWidth) / 2, (height - boxHeight) / 2, boxWidth, boxHeight], w, h);
  }
  if (model.resize !== "pad") return resize(pixels, width, height, channels, [0, 0, width, height], w, h);
  const wider = width / height > w / h, exact = width * h === height * w;
  const inner = exact ? [w, h] : wider ? [w, Math.round(height / width * w)] : [Math.round(width / height * h), h];
  const small = resize(pixels, width, height, channels, [0, 0, width, height], ...inner.map((side) => Math.max(1, side)));
  const result = new Uint8ClampedArray(w * h * channels);
  const left = Math.round((w - inner[0]) / 2), top = Math.round((h - inner[1]) / 2);
  for (let y = 0; y < inner[1]; y++)
    result.set(small.subarray(y * inner[0] * channels, (y + 1) * inner[0] * channels), ((top + y) * w + left) * channels);
  return result;
}

// A drawing as MNIST's digits are: its box scaled to fit 20 x 20, its centre of mass at pixel 14 of 28 x 28.
function centreDrawing({ data, width, height }) {
  const ink = Uint8ClampedArray.from({ length: width * height }, (_, i) => data[4 * i + 3]);
  let [left, right, top, bottom] = [width, -1, height, -1];
  ink.forEach((value, i) => {
    if (value <= 25) return; // the soft edge of a stroke is not its box
    const [x, y] = [i % width, Math.floor(i / width)];
    [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
  });
  if (right < 0) return null;
  const [w, h] = [right - left + 1, bottom - top + 1], ratio = 20 / Math.max(w, h);
  const [sw, sh] = [Math.max(1, Math.round(w * ratio)), Math.max(1, Math.round(h * ratio))];
  const small = resize(ink, width, height, 1, [left, top, w, h], sw, sh);
  let [mass, mx, my] = [0, 0, 0];
  small.forEach((value, i) => { mass += value; mx += value * (i % sw + 0.5); my += value * (Math.floor(i / sw) + 0.5); });
  const at = (centre, side) => Math.min(28 - side, Math.max(0, Math.round(14.5 - centre / mass)));
  const [dx, dy] = [at(mx, sw), at(my, sh)], image = new ImageData(28, 28);
  image.data.forEach((_, i) => { if (i % 4 === 3) image.data[i] = 255; });
  small.forEach((value, i) => image.data.fill(value, 4 * ((dy + Math.floor(i / sw)) * 28 + dx + i % sw), 4 * ((dy + Math.floor(i / sw)) * 28 + dx + i % sw) + 3));
  return image;
}

// -------------------------------------------------------------------------------------------------------- the models

// Which patches of a model are hidden, where the mask was chosen on the grid of another.
function hiddenOf(model) {
  const from = lead(), [rows, columns] = gridOf(model), share = new Float32Array(rows * columns);
  for (let y = 0; y < model.height; y++)
    for (let x = 0; x < model.width; x++)
      share[Math.floor(y / model.patch) * columns + Math.floor(x / model.patch)] +=
        state.hidden[Math.floor(y / from.patch) * gridOf(from)[1] + Math.floor(x / from.patch)] / model.patch ** 2;
  return Array.from(share, (value) => value > 0.5);
}

const planes = (x, model) => { // (H, W, C) -> a tensor's (1, C, H, W)
  const size = model.height * model.width, data = new Float32Array(x.length);
  x.forEach((value, i) => { data[(i % model.channels) * size + Math.floor(i / model.channels)] = value; });
  return [data, [1, model.channels, model.height, model.width]];
};
// The patch in which number i of (H, W, C) lies, and its place within.
const placeOf = (i, { width, channels, patch }) => {
  const pixel = Math.floor(i / channels), [y, x] = [Math.floor(pixel / width), pixel % width];
  return [Math.floor(y / patch) * (width / patch) + Math.floor(x / patch), ((y % patch) * patch + x % patch) * channels + i % channels];
};

async function rebuild(model, x) { // x: float (H, W, C) in [-1, 1]
  const hidden = hiddenOf(model), ort = await runtime, session = await sessionOf(model);
  const all = [...hidden.keys()], keep = all.filter((i) => !hidden[i]);
  if (!keep.length || keep.length === hidden.length) return { problem: keep.length ? "Hide a patch." : "Show a patch." };
  const restore = new BigInt64Array(hidden.length);
  [...keep, ...all.filter((i) => hidden[i])].forEach((patch, place) => { restore[patch] = BigInt(place); });
  const began = performance.now();
  const { pred } = await session.run({
    images: new ort.Tensor("float32", ...planes(x, model)),
    ids_keep: new ort.Tensor("int64", BigInt64Array.from(keep, BigInt), [1, keep.length]),
    ids_restore: new ort.Tensor("int64", restore, [1, hidden.length]),
  });
  const took = performance.now() - began, numbers = pred.dims[2];
  const patches = new Float32Array(pred.data.length), seen = new Float64Array(model.channels);
  x.forEach((value, i) => {
    const [patch, place] = placeOf(i, model);
    patches[patch * numbers + place] = value;
    if (!hidden[patch]) seen[i % model.channels] += value / (keep.length * model.patch ** 2); // the mean of each channel
  });
  const found = Float32Array.from(pred.data);
  if (model.normalised)
    for (const patch of all) {
      const truth = patches.subarray(patch * numbers, (patch + 1) * numbers), mean = truth.reduce((a, b) => a + b) / numbers;
      const variance = truth.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (numbers - 1);
      for (let i = patch * numbers; i < (patch + 1) * numbers; i++) found[i] = found[i] * Math.sqrt(variance + 1e-6) + mean;
    }
  let [error, guess] = [0, 0];
  const masked = new Float32Array(x.length), rebuilt = Float32Array.from(x), apart = new Float32Array(x.length);
  const size = (hidden.length - keep.length) * numbers;
  x.forEach((value, i) => {
    const [patch, place] = placeOf(i, model);
    if (!hidden[patch]) return void (masked[i] = value);
    const ours = found[patch * numbers + place];
    error += (ours - value) ** 2 / size;
    guess += (seen[i % model.channels] - value) ** 2 / size;
    rebuilt[i] = Math.min(1, Math.max(-1, ours));
    apart[i] = 2 * Math.sqrt(Math.abs(rebuilt[i] - value) / 2) - 1; // the root shows small errors too
  });
  apart.forEach((value, i) => { if (!hidden[placeOf(i, model)[0]]) apart[i] = -1; });
  return { pred: pred.data, error, guess, masked, rebuilt, apart, took };
}

async function classify(model, x) {
  const ort = await runtime, session = await sessionOf(model), began = performance.now();
  const { logits, attention } = await session.run({ images: new ort.Tensor("float32", ...planes(x, model)) });
  const took = performance.now() - began, top = Math.max(...logits.data);
  const shares = Array.from(logits.data, (value) => Math.exp(value - top)), total = shares.reduce((a, b) => a + b);
  return { probabilities: shares.map((share) => share / total), attention: attention.data, took };
}

const answers = new Map(); // by model, of the last whole image: a click on a patch leaves it as it is
async function classifyWhole(model, x) {
  const before = answers.get(model.asset);
  if (before?.x.every((value, i) => value === x[i])) return before.answer;
  const answer = await classify(model, x);
  answers.set(model.asset, { x, answer });
  return answer;
}

// -------------------------------------------------------------------------------------------------------- what is seen

function paint(canvas, x, { width, height, channels }) { // x: (H, W, C) in [-1, 1]
  Object.assign(canvas, { width, height });
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++)
    image.data.set([0, 1, 2].map((c) => (x[i * channels + (channels === 3 ? c : 0)] + 1) * 127.5).concat(255), 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

const picture = (caption) => {
  const figure = make("figure"), canvas = make("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption);
  figure.append(canvas, make("figcaption", caption));
  return { figure, canvas };
};

function bars(rows) { // [[name, length from 0 to 1, text, best]]
  const box = make("div");
  box.className = "bars";
  for (const [name, length, text, best] of rows) {
    const row = make("div"), track = make("i"), bar = make("u");
    row.className = best ? "best" : "";
    bar.style.width = `${100 * length}%`;
    track.append(bar);
    row.append(make("b", name), track, make("span", text));
    box.append(row);
  }
  return box;
}

const heat = (share) => [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]].reduce((_, colour, i, all) => {
  const at = share * (all.length - 1), low = all[Math.min(Math.floor(at), all.length - 2)], high = all[Math.min(Math.floor(at), all.length - 2) + 1];
  return low.map((value, c) => value + (high[c] - value) * (at - Math.min(Math.floor(at), all.length - 2)));
});

async function show(model, box) {
  const bytes = fit(state.image, model), x = Float32Array.from(bytes, (value) => value / 127.5 - 1);
  const parts = [make("h3", model.name)], row = Object.assign(make("div"), { className: "row" });
  let said;
  if (model.rebuilds) {
    const found = await rebuild(model, x);
    state.says[model.name] = found;
    if (found.problem) said = found.problem;
    else {
      const names = { masked: "what it sees", rebuilt: "what it makes of that", apart: "its error (root)" };
      for (const [name, caption] of Object.entries(names)) {
        const { figure, canvas } = picture(caption);
        paint(canvas, found[name], model);
        row.append(figure);
      }
      const longest = Math.max(found.error, found.guess, 1e-9);
      const errors = [["this model", found.error], ["the mean of what is visible", found.guess]];
      parts.push(row, bars(errors.map(([name, value]) => [name, value / longest, value.toFixed(4), value === Math.min(found.error, found.guess)])));
      said = "Mean squared error over the hidden pixels, on a scale from -1 to 1." +
        (model.normalised ? " Patches were given their true mean and deviation." : "") + ` ${Math.round(found.took)} ms.`;
    }
  } else {
    const { figure, canvas } = picture("where it looks (attention rollout)");
    const hidden = hiddenOf(model), covered = x.map((value, i) => (hidden[placeOf(i, model)[0]] ? 0 : value));
    const [whole, part] = [await classifyWhole(model, x), await classify(model, covered)];
    state.says[model.name] = whole;
    const most = Math.max(...whole.attention, 1e-12), grey = { ...model, channels: 3 };
    paint(canvas, Float32Array.from({ length: model.width * model.height * 3 }, (_, i) => {
      const at = Math.floor(i / 3) * model.channels, mean = x.subarray(at, at + model.channels).reduce((a, b) => a + b) / model.channels;
      return 0.35 * mean + 0.65 * (heat(whole.attention[placeOf(at, model)[0]] / most)[i % 3] / 127.5 - 1);
    }), grey);
    const best = whole.probabilities.indexOf(Math.max(...whole.probabilities));
    let rows = whole.probabilities.map((share, i) => [model.classes[i], share, `${(100 * share).toFixed(1)} %`, i === best]);
    if (rows.length > 10) rows = rows.sort((a, b) => b[1] - a[1]).slice(0, 10);
    row.append(figure, bars(rows));
    parts.push(row);
    const seen = part.probabilities.indexOf(Math.max(...part.probabilities));
    said = `It says ${model.classes[best]}; with the hidden patches in grey, ${model.classes[seen]} (${(100 * part.probabilities[seen]).toFixed(1)} %). ${Math.round(part.took)} ms.`;
  }
  const text = make("p", said);
  text.className = "said note";
  text.setAttribute("aria-live", "polite");
  box.replaceChildren(...parts, text);
}

let busy = false, stale = false;
async function update() { // the newest state is shown; those that were overtaken are not
  if (busy) return void (stale = true);
  busy = true;
  try {
    do {
      stale = false;
      const models = shownModels();
      if ($("results").dataset.group !== state.group) {
        $("results").dataset.group = state.group;
        $("results").replaceChildren(...models.map(() => Object.assign(make("article", "Loading…"), { className: "model" })));
      }
      for (const [i, model] of models.entries()) {
        await sessionOf(model);
        if (stale) break;
        await show(model, $("results").children[i]);
      }
    } while (stale);
    document.body.dataset.ready = (Number(document.body.dataset.ready) || 0) + 1;
  } catch (error) {
    complain(`This browser cannot run the models: ${error.message}. A current Firefox, Chrome, Edge or Safari can.`);
  } finally {
    busy = false;
  }
}

function complain(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text;
}

function showMask() {
  [...$("cells").children].forEach((cell, i) => cell.setAttribute("aria-pressed", state.hidden[i] === 1));
  const count = state.hidden.reduce((a, b) => a + b, 0);
  $("count").textContent = `${count} of ${state.hidden.length} patches hidden. Click or paint to change it.`;
  $("ratio").value = Math.round(100 * count / state.hidden.length);
  $("ratio").setAttribute("aria-valuetext", `${count} of ${state.hidden.length} patches`);
  update();
}

function hideFirst(count) {
  state.hidden.fill(0);
  for (const patch of state.order.slice(0, count)) state.hidden[patch] = 1;
  showMask();
}

function reorder(kind) { // in which order patches vanish
  const [, columns] = gridOf(lead()), total = state.hidden.length, centre = Math.floor(Math.random() * total);
  const far = (i) => Math.max(Math.abs(Math.floor(i / columns) - Math.floor(centre / columns)), Math.abs(i % columns - centre % columns));
  const keys = [...Array(total).keys()].map((i) => (kind === "block" ? far(i) : 0) + 0.9 * Math.random());
  state.order = [...keys.keys()].sort((a, b) => keys[a] - keys[b]);
}

function showImage() {
  paint($("picture"), Float32Array.from(fit(state.image, lead()), (value) => value / 127.5 - 1), lead());
  update();
}

function choose(group) {
  state.group = group;
  const model = lead(), [rows, columns] = gridOf(model);
  [...$("groups").children].forEach((tab) => tab.setAttribute("aria-selected", tab.textContent === group));
  $("cells").style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  $("cells").replaceChildren(...Array.from({ length: rows * columns }, (_, i) => {
    const cell = make("button");
    cell.setAttribute("aria-label", `row ${Math.floor(i / columns) + 1}, column ${i % columns + 1}, hidden`);
    cell.tabIndex = i ? -1 : 0; // one stop for the tab key; arrows go on
    return cell;
  }));
  $("thumbs").replaceChildren(...ABOUT.examples[group].map((src, i) => {
    const button = make("button"), image = Object.assign(make("img"), { src, alt: `example ${i + 1}` });
    button.append(image);
    button.onclick = () => take(src);
    return button;
  }));
  $("board").hidden = !shownModels().some((other) => other.digits);
  state.hidden = Array(rows * columns).fill(0);
  reorder("random");
  hideFirst(rows * columns - Math.floor(rows * columns * (1 - model.ratio)));
  const first = ABOUT.examples[group][0];
  if (first) take(first);
  else { state.image = landscape(model); showImage(); }
}

function landscape({ width, height }) { // something to begin with
  const pen = new OffscreenCanvas(width, height).getContext("2d"), sky = pen.createLinearGradient(0, 0, 0, height);
  sky.addColorStop(0, "#3f7fd0");
  sky.addColorStop(0.6, "#f3d9b8");
  const shapes = [[sky, 0, 0, 1, 1], ["#4c7a3a", 0, 0.62, 1, 0.38], ["#9c4a32", 0.2, 0.45, 0.3, 0.3], ["#efe6d2", 0.3, 0.55, 0.08, 0.1]];
  for (const [colour, x, y, w, h] of shapes) {
    pen.fillStyle = colour;
    pen.fillRect(x * width, y * height, w * width, h * height);
  }
  pen.fillStyle = "#fff3c4";
  pen.arc(0.75 * width, 0.25 * height, 0.1 * height, 0, 7);
  pen.fill();
  return pen.getImageData(0, 0, width, height);
}

async function take(source) { // an address, or a file that was opened, dropped or pasted
  try {
    const blob = typeof source === "string" ? new Blob([Uint8Array.from(atob(source.split(",")[1]), (c) => c.charCodeAt(0))]) : source;
    const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
    const { width, height } = bitmap, pen = new OffscreenCanvas(width, height).getContext("2d");
    pen.fillStyle = "#fff"; // transparency on white, as when maelab reads a file
    pen.fillRect(0, 0, width, height);
    pen.drawImage(bitmap, 0, 0);
    state.image = pen.getImageData(0, 0, width, height);
    complain("");
    showImage();
  } catch {
    complain(`This browser cannot read ${source.name || "it"} as an image. PNG, JPEG, WebP and GIF work.`);
  }
}

// ------------------------------------------------------------------------------------------------------- what is done

for (const group of groups) {
  const tab = make("button", group);
  tab.setAttribute("role", "tab");
  tab.onclick = () => choose(group);
  $("groups").append(tab);
}
$("groups").hidden = groups.length < 2;

let painting = null; // 1 hides, 0 shows
const toggle = (cell, value) => {
  const i = [...$("cells").children].indexOf(cell);
  if (i < 0 || state.hidden[i] === value) return;
  state.hidden[i] = value;
  showMask();
};
$("cells").onpointerdown = (event) => {
  painting = event.target.getAttribute("aria-pressed") === "true" ? 0 : 1;
  event.target.releasePointerCapture?.(event.pointerId); // a finger paints over other patches too
  toggle(event.target, painting);
};
$("cells").onpointermove = (event) => {
  if (painting !== null && event.buttons) toggle(document.elementFromPoint(event.clientX, event.clientY), painting);
};
addEventListener("pointerup", () => { painting = null; });
$("cells").onclick = (event) => { // of the keyboard, or of a screen reader; a pointer has painted already
  if (event.detail === 0) toggle(event.target, event.target.getAttribute("aria-pressed") === "true" ? 0 : 1);
};
$("cells").onkeydown = (event) => {
  const columns = gridOf(lead())[1], cells = [...$("cells").children], i = cells.indexOf(event.target);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (!step || !cells[i + step]) return;
  event.preventDefault();
  cells[i].tabIndex = -1;
  cells[i + step].tabIndex = 0;
  cells[i + step].focus();
};
$("ratio").oninput = () => hideFirst(Math.round($("ratio").value / 100 * state.hidden.length));
const again = (kind) => () => {
  reorder(kind);
  hideFirst(state.hidden.reduce((a, b) => a + b, 0) || Math.ceil(state.hidden.length / 2));
};
$("again").onclick = again("random");
$("block").onclick = again("block");
$("none").onclick = () => hideFirst(0);
$("file").onchange = () => { take($("file").files[0]); $("file").value = ""; };
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]); });
addEventListener("paste", (event) => { if (event.clipboardData.files[0]) take(event.clipboardData.files[0]); });

const ink = $("ink"), pen = ink.getContext("2d", { willReadFrequently: true });
Object.assign(pen, { lineWidth: ink.width / 13, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
const at = (event) => [event.offsetX * ink.width / ink.clientWidth, event.offsetY * ink.height / ink.clientHeight];
const drawn = () => {
  const digit = centreDrawing(pen.getImageData(0, 0, ink.width, ink.height));
  if (digit) { state.image = digit; showImage(); }
};
ink.onpointerdown = (event) => {
  ink.setPointerCapture(event.pointerId);
  pen.beginPath();
  pen.moveTo(...at(event));
  pen.lineTo(...at(event));
  pen.stroke();
};
ink.onpointermove = (event) => {
  if (!ink.hasPointerCapture(event.pointerId)) return;
  for (const step of event.getCoalescedEvents?.() ?? [event]) pen.lineTo(...at(step));
  pen.stroke();
  drawn();
};
ink.onpointerup = drawn;
$("clear").onclick = () => pen.clearRect(0, 0, ink.width, ink.height);

$("about").textContent = `Weights are rounded to 7 bits a number (${ABOUT.models.map((model) => `${model.name}: ${(100 * model.rounding).toFixed(1)} %`).join(", ")} RMS).`;
choose(groups[0]);
