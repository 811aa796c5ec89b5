// An image below a grid of buttons: a click hides or shows a patch.
element.addEventListener("click", (event) => {
  const cell = event.target.closest(".cells button");
  if (!cell) return;
  cell.setAttribute("aria-pressed", cell.getAttribute("aria-pressed") !== "true");
  const cells = [...element.querySelectorAll(".cells button")];
  trigger("toggled", { mask: cells.map((c) => (c.getAttribute("aria-pressed") === "true" ? "1" : "0")).join("") });
});
