// A board to draw on: while a stroke grows, and at its end, its pixels go to the server as base64 of SIDE x SIDE bytes.
const SIDE = 140;
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
const small = new OffscreenCanvas(SIDE, SIDE).getContext("2d", { willReadFrequently: true });
let drawing = false, sent = 0;
Object.assign(pen, { lineWidth: canvas.width / 13, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
const send = () => {
  small.clearRect(0, 0, SIDE, SIDE);
  small.drawImage(canvas, 0, 0, SIDE, SIDE);
  const { data } = small.getImageData(0, 0, SIDE, SIDE);
  let bytes = "";
  for (let i = 3; i < data.length; i += 4) bytes += String.fromCharCode(data[i]);
  sent = Date.now();
  trigger("drawn", { ink: btoa(bytes) });
};
const at = (event) => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
};
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  drawing = true;
  sent = Date.now();
  pen.beginPath();
  pen.moveTo(...at(event));
  pen.lineTo(...at(event));
  pen.stroke();
});
canvas.addEventListener("pointermove", (event) => {
  if (!drawing) return;
  for (const step of event.getCoalescedEvents?.() ?? [event]) pen.lineTo(...at(step));
  pen.stroke();
  if (Date.now() - sent > 250) send();
});
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, () => { if (drawing) { drawing = false; send(); } });
element.querySelector("button").addEventListener("click", () => {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  send();
});
