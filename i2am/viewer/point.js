// Pointer and keys on a picture: point, hold, drag an area.

function ask(query, pinned) {
  if (JSON.stringify([query, pinned]) === JSON.stringify([state.query, state.pinned])) return;
  Object.assign(state, { query, pinned });
  changed();
}

function gridOf({ sample, side }) {
  return sample.stacks[PAIRS[side]].asked;
}

function cellAt(panel, event) {
  const { left, top, width, height } = panel.stage.getBoundingClientRect(), [rows, columns] = gridOf(panel);
  const cell = (place, size, count) => Math.min(count - 1, Math.max(0, Math.floor((place / size) * count)));
  return [cell(event.clientY - top, height, rows), cell(event.clientX - left, width, columns)];
}

function area(panel, [row, column], [otherRow, otherColumn]) {
  const cells = [Math.min(row, otherRow), Math.min(column, otherColumn), Math.max(row, otherRow), Math.max(column, otherColumn)];
  return { side: panel.side, cells, grid: gridOf(panel) };
}

function same(one, other) {
  return JSON.stringify(one) === JSON.stringify(other);
}

function listen(panel) {
  const { stage } = panel;
  stage.addEventListener("pointerdown", (event) => {
    if (!askable(panel.sample) || event.button) return;
    const cell = cellAt(panel, event);
    drag = { panel, cell, before: state.pinned ? state.query : null };
    stage.setPointerCapture(event.pointerId);
    ask(area(panel, cell, cell), false);
  });
  stage.addEventListener("pointermove", (event) => {
    if (!askable(panel.sample)) return;
    if (drag?.panel === panel) ask(area(panel, drag.cell, cellAt(panel, event)), false);
    else if (!state.pinned && event.pointerType !== "touch") ask(area(panel, cellAt(panel, event), cellAt(panel, event)), false);
  });
  stage.addEventListener("pointerup", (event) => {
    if (drag?.panel !== panel) return;
    const query = area(panel, drag.cell, cellAt(panel, event)), again = same(query, drag.before);
    drag = null;
    // a second press on what is held lets it go
    if (again) ask(event.pointerType === "touch" ? null : query, false);
    else ask(query, true);
  });
  const leave = () => {
    if (!drag && !state.pinned && state.query?.side === panel.side) ask(null, false);
  };
  stage.addEventListener("pointerleave", leave);
  stage.addEventListener("pointercancel", () => { drag = null; ask(null, false); });
  stage.addEventListener("keydown", (event) => press(panel, event));
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
let anchor = null;

function press(panel, event) {
  if (!askable(panel.sample) || event.ctrlKey || event.metaKey || event.altKey) return;
  const [rows, columns] = gridOf(panel), own = state.query?.side === panel.side ? state.query : null;
  if (event.key === "Enter" && own) {
    event.preventDefault();
    ask(own, !state.pinned);
  }
  const step = ARROWS[event.key];
  if (!step) return;
  event.preventDefault();
  const within = ([row, column]) => [Math.min(rows - 1, Math.max(0, row)), Math.min(columns - 1, Math.max(0, column))];
  if (!own) anchor = [[rows >> 1, columns >> 1], [rows >> 1, columns >> 1]];
  else {
    const [top, left, bottom, right] = own.cells;
    // the corner that moves; a patch that was pointed at starts anew
    if (!anchor || !same(area(panel, ...anchor), own)) anchor = [[top, left], [bottom, right]];
    const moved = within([anchor[1][0] + step[0], anchor[1][1] + step[1]]);
    anchor = event.shiftKey ? [anchor[0], moved] : [moved, moved];
  }
  ask(area(panel, ...anchor), true);
}
