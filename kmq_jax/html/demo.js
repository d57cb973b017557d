// Recordings in, decisions out, all within the page. What Python does is done alike: see kmq_jax.data.audio,
// kmq_jax.scoring.cosine and kmq_jax.cascade.verifier.
import * as ort from "./ort/ort.wasm.min.mjs";

const RATE = 16000; // Hz
const SHORTEST = 0.1, LONGEST = 60; // seconds; a browser's memory is small
const SILENCE = 1e-4, LOUDEST = 2, MOST_OUTSIDE = 0.01; // as kmq_jax.data.audio has them
const UNSURE = 2; // seconds, below which a recording is called short

const settings = JSON.parse(document.getElementById("settings").textContent);
ort.env.wasm.proxy = true; // in a worker: the page stays alive while the model runs

// ---- sound

// The sample rate that a WAV or FLAC file names, or null of other files, whose decoder alone knows it; and whether its
// samples are floating point, which alone can be of another scale.
function described(bytes) {
  const view = new DataView(bytes);
  const text = (from, length) => String.fromCharCode(...new Uint8Array(bytes, from, length));
  if (bytes.byteLength > 44 && text(0, 4) === "RIFF" && text(8, 4) === "WAVE") {
    for (let at = 12; at + 16 <= bytes.byteLength; at += 8 + view.getUint32(at + 4, true) + (view.getUint32(at + 4, true) & 1)) {
      if (text(at, 4) !== "fmt ") continue;
      const plain = view.getUint16(at + 8, true), long = plain === 0xfffe && at + 34 <= bytes.byteLength;
      return { rate: view.getUint32(at + 12, true), floats: (long ? view.getUint16(at + 32, true) : plain) === 3 };
    }
  }
  if (bytes.byteLength > 22 && text(0, 4) === "fLaC") return { rate: view.getUint32(18) >>> 12, floats: false };
  return { rate: null, floats: false };
}

// A file's samples at 16 kHz, mono, and what was done to get them. The browser decodes it, and resamples where needed.
async function decoded(file) {
  const bytes = await file.arrayBuffer();
  const { rate, floats } = described(bytes);
  let sound;
  try {
    sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes);
  } catch {
    throw new Error("this browser cannot decode it");
  }
  const notes = [];
  if (rate === null) notes.push("decoded by the browser to 16 kHz");
  else if (rate !== RATE) notes.push(`resampled from ${rate} Hz to 16 kHz`);
  const channels = Array.from({ length: sound.numberOfChannels }, (_, i) => sound.getChannelData(i));
  if (channels.length > 1) notes.push(`mean of ${channels.length} channels`);
  return { wave: mixed(channels), notes, floats };
}

function mixed(channels) {
  if (channels.length === 1) return channels[0];
  return channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length);
}

async function resampled(wave, rate) {
  if (rate === RATE || !wave.length) return wave;
  const context = new OfflineAudioContext(1, Math.ceil(wave.length * RATE / rate), RATE);
  const source = context.createBufferSource();
  source.buffer = new AudioBuffer({ length: wave.length, sampleRate: rate });
  source.buffer.copyToChannel(wave, 0);
  source.connect(context.destination);
  source.start();
  return (await context.startRendering()).getChannelData(0);
}

// Samples that a model can take, or an error that says why there are none; adds to the notes what was done. Decoders
// and resampling overshoot where a recording was loud, however often that was: only floats must keep to full scale.
function checked(wave, notes, floats) {
  if (wave.length < SHORTEST * RATE) throw new Error(`too short (${(wave.length / RATE).toFixed(2)} s)`);
  if (wave.length > LONGEST * RATE) {
    notes.push(`the first ${LONGEST} s of ${Math.round(wave.length / RATE)} s`);
    wave = wave.slice(0, LONGEST * RATE);
  }
  let sum = 0, squares = 0, peak = 0, outside = 0;
  for (const value of wave) {
    if (!Number.isFinite(value)) throw new Error("values that are not finite");
    sum += value;
    squares += value * value;
    peak = Math.max(peak, Math.abs(value));
    outside += Math.abs(value) > 1;
  }
  const mean = sum / wave.length;
  if (Math.sqrt(Math.max(squares / wave.length - mean * mean, 0)) < SILENCE) throw new Error("silent: nothing was recorded");
  if (peak > LOUDEST || floats && outside > MOST_OUTSIDE * wave.length) {
    throw new Error(`values up to ${peak.toPrecision(4)}, where full scale is 1`);
  }
  if (outside) notes.push("clipped to full scale");
  if (wave.length < UNSURE * RATE) notes.push("short: errors are more likely");
  return wave.map((value) => Math.min(Math.max(value, -1), 1));
}

// A WAV file of 32-bit floats: exactly what the model was given.
function wavFile(wave) {
  const head = new DataView(new ArrayBuffer(44));
  const text = (at, word) => [...word].forEach((letter, i) => head.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF"); head.setUint32(4, 36 + 4 * wave.length, true); text(8, "WAVEfmt ");
  head.setUint32(16, 16, true); head.setUint16(20, 3, true); head.setUint16(22, 1, true);
  head.setUint32(24, RATE, true); head.setUint32(28, 4 * RATE, true); head.setUint16(32, 4, true); head.setUint16(34, 32, true);
  text(36, "data"); head.setUint32(40, 4 * wave.length, true);
  return new Blob([head.buffer, wave], { type: "audio/wav" });
}

// ---- embeddings and decisions

const sessions = settings.levels.map(() => null);
let last = Promise.resolve();

// One thing at a time: the runtime neither opens two models at once, nor runs one meanwhile.
function queued(task) {
  last = last.catch(() => {}).then(task);
  return last;
}

function session(level) {
  sessions[level] ??= ort.InferenceSession.create(settings.levels[level].file, { executionProviders: ["wasm"] })
    .catch((error) => { sessions[level] = null; throw new Error(`the model cannot be opened: ${error.message}`); });
  return sessions[level];
}

// A recording's embedding at a level, of length one, made when it is first needed; and the milliseconds that took.
function embedding(recording, level) {
  recording.embeddings[level] ??= queued(async () => {
    const model = await session(level);
    const start = performance.now();
    const wave = recording.wave.slice(); // it is handed over to the worker
    const { embs } = await model.run({ wave: new ort.Tensor("float32", wave, [1, wave.length]) });
    return { unit: unit(embs.data), milliseconds: performance.now() - start };
  }).catch((error) => { recording.embeddings[level] = undefined; throw error; }); // the next one tries again
  return recording.embeddings[level];
}

const dot = (one, two) => one.reduce((sum, value, i) => sum + value * two[i], 0);

function unit(vector) {
  const length = Math.sqrt(dot(vector, vector));
  if (!(length > 1e-15 && length < 1e15)) throw new Error("the model gives no usable embedding of it");
  return Float64Array.from(vector, (value) => value / length);
}

// The mean of embeddings of length one.
function average(units) {
  return units[0].map((_, i) => units.reduce((sum, one) => sum + one[i], 0) / units.length);
}

// A score on the reference's scale: a straight line, or one between knots and constant outside of them.
function mapped(map, score) {
  if (map === null) return score;
  if (map.kind === "affine") return map.scale * score + map.offset;
  const { x, y } = map;
  const next = x.findIndex((knot) => knot > score);
  if (next === 0) return y[0];
  if (next < 0) return y[y.length - 1];
  return y[next - 1] + (y[next] - y[next - 1]) * (score - x[next - 1]) / (x[next] - x[next - 1]);
}

// Scores a recording against enrolled ones, by as many levels as it takes.
async function verify(enrolled, test) {
  const top = settings.levels.length - 1;
  let milliseconds = 0;
  for (let level = 0; ; level++) {
    const own = await embedding(test, level);
    const others = await Promise.all(enrolled.map((one) => embedding(one, settings.enrolment === "top" ? top : level)));
    milliseconds += own.milliseconds;
    const speaker = average(others.map((one) => one.unit));
    const { map, gate, bits } = settings.levels[level];
    const cosine = Math.min(Math.max(dot(speaker, own.unit) / Math.sqrt(dot(speaker, speaker)), -1), 1);
    const score = Math.fround(mapped(map, cosine));
    const inDoubt = level < top && !(gate[0] !== null && score <= Math.fround(gate[0])) && !(gate[1] !== null && score >= Math.fround(gate[1]));
    if (!inDoubt) return { score, bits, milliseconds };
  }
}

// ---- the microphone

// Records until `stop` is called, which gives the samples at 16 kHz and what was done; `heard` is told each piece.
async function record(heard) {
  if (!navigator.mediaDevices) throw new Error("browsers give the microphone only to pages of https:// or of this machine");
  const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: plain });
  } catch (error) {
    const why = { NotAllowedError: "the browser was not allowed to use the microphone", NotFoundError: "there is no microphone" };
    throw new Error(why[error.name] ?? `the microphone cannot be used: ${error.message}`);
  }
  const context = new AudioContext();
  const pieces = [];
  const release = async () => {
    stream.getTracks().forEach((track) => track.stop());
    await context.close();
  };
  try {
    await context.audioWorklet.addModule("recorder.js");
    const recorder = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
    recorder.port.onmessage = ({ data }) => {
      pieces.push(data);
      heard(data, context.sampleRate);
    };
    context.createMediaStreamSource(stream).connect(recorder);
    await context.resume();
  } catch (error) {
    await release();
    throw error;
  }
  return async () => {
    await release();
    const wave = new Float32Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
    pieces.reduce((at, piece) => { wave.set(piece, at); return at + piece.length; }, 0);
    const notes = context.sampleRate === RATE ? [] : [`resampled from ${context.sampleRate} Hz to 16 kHz`];
    return { wave: await resampled(wave, context.sampleRate), notes };
  };
}

// ---- the page

const sides = { enrol: [], test: [] };
const threshold = document.getElementById("threshold");
const errorLine = document.getElementById("error");
let recorded = 0;

function tell(message) {
  errorLine.textContent = message;
  errorLine.hidden = !message;
}

// Draws the peaks of samples over the whole width.
function draw(canvas, wave) {
  const dense = devicePixelRatio || 1;
  canvas.width = Math.max(canvas.clientWidth * dense, 1);
  canvas.height = Math.max(canvas.clientHeight * dense, 1);
  const pen = canvas.getContext("2d");
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  const bars = Math.floor(canvas.width / (3 * dense)), each = wave.length / bars;
  for (let bar = 0; bar < bars; bar++) {
    let peak = 0;
    for (let i = Math.floor(bar * each); i < (bar + 1) * each && i < wave.length; i++) peak = Math.max(peak, Math.abs(wave[i]));
    const height = Math.max(peak * canvas.height, dense);
    pen.fillRect(3 * dense * bar, (canvas.height - height) / 2, 2 * dense, height);
  }
}

function add(side, name, wave, notes, floats = false) {
  const recording = { wave: checked(wave, notes, floats), embeddings: [] };
  const item = document.getElementById("recording").content.cloneNode(true).firstElementChild;
  const address = URL.createObjectURL(wavFile(recording.wave));
  const part = (selector) => item.querySelector(selector);
  part(".name").textContent = name;
  const about = [`${(recording.wave.length / RATE).toFixed(1)} s`, ...notes];
  part(".about").textContent = about.join("; ");
  part("audio").src = part(".save").href = address;
  part("audio").setAttribute("aria-label", `Play ${name}`);
  part(".save").download = `${name.replace(/\.\w+$/, "")}.wav`;
  part(".save").setAttribute("aria-label", `Save ${name} as WAV`);
  part(".remove").setAttribute("aria-label", `Remove ${name}`);
  part(".remove").onclick = () => {
    sides[side].splice(sides[side].indexOf(recording), 1);
    URL.revokeObjectURL(address);
    item.remove();
    document.querySelector(`#${side} .record`).focus();
    update();
  };
  recording.part = part;
  sides[side].push(recording);
  document.querySelector(`#${side} .recordings`).append(item);
  draw(part("canvas"), recording.wave);
  embedding(recording, 0).then(
    ({ milliseconds }) => { part(".about").textContent = [...about, `embedded in ${Math.round(milliseconds)} ms`].join("; "); },
    () => {}, // told where it is needed
  );
  update();
}

let newest = 0;

// Verifies every recording again, for what is enrolled now.
async function update() {
  const mine = ++newest, enrolled = [...sides.enrol];
  for (const test of [...sides.test]) {
    try {
      const found = enrolled.length ? await verify(enrolled, test) : null;
      if (mine !== newest) return; // something has changed since
      test.found = found;
    } catch (error) {
      if (mine === newest) tell(error.message);
      return;
    }
    show(test);
  }
}

const shown = (number) => number.toFixed(4).replace("-", "\u2212");
const limit = () => (threshold.value === "" ? null : Number(threshold.value));

// What is known of a recording: score, decision, bits, time.
function show({ part, found }) {
  const verdict = part(".verdict"), scale = part(".scale"), least = limit();
  verdict.hidden = scale.hidden = false;
  if (!found) {
    verdict.textContent = "Enrol a speaker to verify this recording.";
    scale.hidden = true;
    return;
  }
  const heading = document.createElement("b");
  const accepted = least !== null && found.score >= Math.fround(least);
  heading.textContent = least === null ? `Score ${shown(found.score)}` : accepted ? "Same speaker" : "Different speakers";
  heading.className = least === null ? "" : accepted ? "yes" : "no";
  const beside = [];
  if (least !== null) beside.push(`score ${shown(found.score)} is ${accepted ? "at least" : "below"} the threshold ${shown(least)}`);
  beside.push(`${found.bits ? `decided at ${found.bits} bits` : "scored"} in ${Math.round(found.milliseconds)} ms`);
  verdict.replaceChildren(heading, document.createElement("br"), beside.join("; "));
  verdict.dataset.score = found.score;
  const place = (value) => `${100 * Math.min(Math.max((value + 0.25) / 1.25, 0), 1)}%`;
  part(".dot").style.left = place(found.score);
  part(".mark").style.left = place(least ?? 0);
  part(".mark").hidden = least === null;
}

function showThreshold() {
  const least = limit();
  const given = settings.threshold !== null && least === settings.threshold;
  const line = given ? settings.known : least === null ? "Without one, scores are shown and nothing is decided." : "";
  document.getElementById("known").textContent =
    given && line ? `${line[0].toUpperCase()}${line.slice(1)}.` : line || "Nothing is known of its error rates.";
  for (const test of sides.test) if (test.found !== undefined) show(test);
}

async function addFiles(side, files) {
  tell("");
  for (const file of files) {
    try {
      const { wave, notes, floats } = await decoded(file);
      add(side, file.name, wave, notes, floats);
    } catch (error) {
      tell(`${file.name}: ${error.message}`);
    }
  }
}

// The button of a side: starts recording, and ends it.
function recordingButton(side, button) {
  const live = document.querySelector(`#${side} .live`), others = [...document.querySelectorAll(".record")];
  let stop = null;
  async function end() {
    const ended = stop;
    stop = null;
    button.textContent = "Record";
    button.setAttribute("aria-pressed", "false");
    live.hidden = true;
    try {
      const { wave, notes } = await ended();
      add(side, `recording ${recorded + 1}`, wave, notes);
      recorded++;
    } catch (error) {
      tell(`The recording is ${error.message}`);
    }
    others.forEach((other) => { other.disabled = false; });
  }
  button.onclick = async () => {
    if (stop) return end();
    tell("");
    others.forEach((other) => { other.disabled = true; });
    const peaks = [];
    let samples = 0;
    try {
      stop = await record((piece, rate) => {
        samples += piece.length;
        peaks.push(piece.reduce((most, value) => Math.max(most, Math.abs(value)), 0));
        live.querySelector("output").textContent = `Recording, ${(samples / rate).toFixed(1)} s`;
        if (samples >= LONGEST * rate && stop) end();
      });
    } catch (error) {
      tell(`${error.message[0].toUpperCase()}${error.message.slice(1)}.`);
      others.forEach((other) => { other.disabled = false; });
      return undefined;
    }
    button.disabled = false;
    button.textContent = "Stop";
    button.setAttribute("aria-pressed", "true");
    live.hidden = false;
    const paint = () => {
      if (!stop) return;
      draw(live.querySelector("canvas"), peaks.slice(-1500)); // the last seconds
      requestAnimationFrame(paint);
    };
    paint();
    return undefined;
  };
}

for (const side of Object.keys(sides)) {
  recordingButton(side, document.querySelector(`#${side} .record`));
  const input = document.querySelector(`#${side} input`), drop = document.querySelector(`#${side} .drop`);
  input.onchange = async () => {
    const files = [...input.files];
    input.value = ""; // the same file can be chosen again
    await addFiles(side, files);
  };
  drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    addFiles(side, [...event.dataTransfer.files]);
  };
}
threshold.oninput = showThreshold;
showThreshold();
queued(() => session(0)).catch((error) => tell(error.message)); // loaded while the first recording is made
