const number = value => {
  const size = Math.abs(value);
  if (value !== 0 && size < 1e-2) return value.toExponential(2);
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  return value.toPrecision(4);
};
for (const figure of document.querySelectorAll("figure")) {
  const script = figure.querySelector("script");
  if (!script) continue;
  const plot = JSON.parse(script.textContent);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), tip = figure.querySelector(".tip");
  const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const share = ((event.clientX - box.left) * scale - plot.left) / (plot.right - plot.left);
    if (share < -0.02 || share > 1.02) return hide();
    const place = value => plot.log ? Math.log(value) : value;
    const wanted = plot.x[0] + share * (plot.x[1] - plot.x[0]);
    const far = point => Math.abs(place(point[0]) - wanted);
    const nearest = points => points.reduce((a, b) => far(b) < far(a) ? b : a);
    const found = plot.series.filter(s => s.points.length).map(s => ({ ...s, point: nearest(s.points) }));
    if (!found.length) return hide();
    const step = found[0].point[0];
    const x = plot.left + (place(step) - plot.x[0]) / (plot.x[1] - plot.x[0]) * (plot.right - plot.left);
    cursor.setAttribute("transform", `translate(${x} 0)`);
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: `${plot.name} ${step}` }));
    for (const { name, class: colour, point } of found) {
      const row = document.createElement("div"), mark = document.createElement("i");
      mark.className = colour;
      const where = point[0] === step ? "" : ` (${plot.name} ${point[0]})`;
      row.append(mark, `${name}: ${number(point[1])}${where}`);
      tip.append(row);
    }
    tip.hidden = false;
    const frame = figure.getBoundingClientRect(), at = x / scale + box.left - frame.left;
    const left = at + tip.offsetWidth + 24 > frame.width ? at - tip.offsetWidth - 12 : at + 12;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, event.clientY - frame.top - tip.offsetHeight - 8)}px`;
  });
}
