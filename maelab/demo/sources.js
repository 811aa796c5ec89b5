// Where an image comes from: a thumbnail, the drawing, or a file, which is read here and sent as base64.
const LIMIT = props.limit;
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("picked", { index: Number(button.dataset.index) });
});
const take = (file) => {
  if (!file) return;
  if (file.size > LIMIT) return trigger("picked", { name: file.name, size: file.size });
  const reader = new FileReader();
  reader.onload = () => trigger("picked", { name: file.name, content: reader.result.split(",")[1] || "" });
  reader.readAsDataURL(file);
};
element.addEventListener("change", (event) => { take(event.target.files[0]); event.target.value = ""; });
element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", (event) => { event.preventDefault(); take(event.dataTransfer.files[0]); });
