"use strict";
// Moves the cells of a run's table of ranks to the allocation that its slider points at. Text goes in as text only.
const NUM_SHADES = 10;
const runs = JSON.parse(document.getElementById("frames").textContent);
for (const slider of document.querySelectorAll("input[data-run]")) {
  const frames = runs[Number(slider.dataset.run)];
  const largest = Number(slider.dataset.largest);
  const cells = document.querySelectorAll('[data-map="' + slider.dataset.run + '"] b');
  const output = document.getElementById("at" + slider.dataset.run);
  const show = () => {
    const frame = frames[Number(slider.value)];
    const words = "after step " + frame.step.toLocaleString("en") + ": " + frame.budget.toLocaleString("en") + " triplets";
    output.textContent = words;
    slider.setAttribute("aria-valuetext", words);
    for (const cell of cells) {
      const rank = frame.ranks[Number(cell.dataset.k)];
      cell.textContent = rank;
      cell.className = "s" + Math.min(NUM_SHADES, Math.ceil((rank * NUM_SHADES) / largest));
    }
  };
  slider.addEventListener("input", show);
  show();
}
