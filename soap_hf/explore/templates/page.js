// Where a patch is chosen: by a click on a picture, or by the arrow keys while the first picture of a row has the focus.
let chosen = null;
const send = (image, down, across) => trigger('click', {image: image, down: down, across: across});
const middle = (place, count) => (Math.min(Math.max(place, 0), count - 1) + 0.5) / count;

element.addEventListener('click', event => {
  const picture = event.target.closest('img[data-image]');
  if (!picture) return;
  const box = picture.getBoundingClientRect();
  chosen = null;
  send(Number(picture.dataset.image), (event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width);
});

element.addEventListener('keydown', event => {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  const picture = event.target.closest('img[data-image]');
  if (!step || !picture) return;
  event.preventDefault();
  const data = picture.dataset, image = Number(data.image), rows = Number(data.rows), columns = Number(data.columns);
  const here = chosen && chosen.image === image ? chosen : {row: Number(data.row), column: Number(data.column)};
  const row = Math.min(Math.max(here.row + step[0], 0), rows - 1);
  const column = Math.min(Math.max(here.column + step[1], 0), columns - 1);
  chosen = {image: image, row: row, column: column};
  send(image, middle(row, rows), middle(column, columns));
});

let focused = null;
element.addEventListener('focusin', event => { focused = event.target.dataset.image ?? null; });
element.addEventListener('focusout', event => { if (event.relatedTarget) focused = null; });
watch('value', () => {
  if (focused !== null) element.querySelector(`img[tabindex][data-image="${focused}"]`)?.focus({preventScroll: true});
});
