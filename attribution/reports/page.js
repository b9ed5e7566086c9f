// Draws every figure from the data beside it and gives its text the colour of the page.
// Of plotly's buttons only the image download stays: one of the others would send the data to a server.
const dark = matchMedia("(prefers-color-scheme: dark)");
const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] };
const plots = [];
function ink() {
  return getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
}
function draw(plot, { data, layout }) {
  layout.font.color = ink();
  plot.style.height = `${layout.height}px`;
  if (plots.includes(plot)) return Plotly.react(plot, data, layout, config);
  plots.push(plot);
  Plotly.newPlot(plot, data, layout, config);
  const figure = plot.closest("figure");
  if (figure.dataset.course) plot.on("plotly_click", ({ points }) => follow(figure, points[0].customdata));
}
// A figure with choices holds the data of every combination; it is read when it is asked for.
function chosen(figure) {
  const plot = figure.querySelector(".plot");
  const sentence = figure.querySelector(".absent");
  const choices = [...figure.querySelectorAll("select")];
  const component = figure.classList.contains("course") ? named("component", figure) : null;
  let held = "";
  figure.redraw = () => {
    const at = choices.map((choice) => choice.selectedIndex).join(".");
    const told = JSON.parse(figure.querySelector(`script[data-at="${at}"]`).textContent);
    const missing = typeof told === "string";
    plot.hidden = missing;
    sentence.hidden = !missing;
    if (missing) sentence.textContent = told;
    else draw(plot, component ? course(told, at) : told);
  };
  function course({ figure: frame, series }, at) {
    if (held !== at) {
      const before = component.value;
      component.replaceChildren(...Object.keys(series).map((name) => new Option(name, name)));
      if (before in series) component.value = before;
      held = at;
    }
    frame.data.forEach((trace, line) => (trace.y = series[component.value][line] ?? []));
    return frame;
  }
  figure.addEventListener("change", figure.redraw);
  figure.redraw();
}
function named(name, figure) {
  const label = document.createElement("label");
  const select = document.createElement("select");
  select.name = name;
  label.append(`${name} `, select);
  figure.querySelector(".choices").append(label);
  return select;
}
// A click on a component in a map shows its course over steps.
function follow(figure, name) {
  const { figure: key, ...told } = JSON.parse(figure.dataset.course);
  const target = document.getElementById(key);
  if (!target || !name) return;
  if (waiting.includes(target)) show(waiting.splice(waiting.indexOf(target), 1)[0]);
  for (const choice of figure.querySelectorAll("select")) told[choice.name] = choice.value;
  const choose = (select) => {
    if ([...select.options].some((option) => option.value === told[select.name])) select.value = told[select.name];
  };
  const choices = [...target.querySelectorAll("select")];
  choices.forEach(choose);
  target.redraw(); // which fills in the components that there are
  told.component = name;
  choices.forEach(choose);
  target.redraw();
  target.scrollIntoView({ block: "nearest" });
}
function show(figure) {
  if (figure.querySelector(".choices")) chosen(figure);
  else draw(figure.querySelector(".plot"), JSON.parse(figure.querySelector("script").textContent));
}
// What is in view is drawn at once, the rest one by one, so that the page can be read meanwhile.
const waiting = [...document.querySelectorAll("figure")];
function showNext() {
  if (waiting.length) {
    show(waiting.shift());
    setTimeout(showNext);
  } else document.documentElement.dataset.drawn = "all";
}
while (waiting.length && waiting[0].getBoundingClientRect().top < innerHeight) show(waiting.shift());
addEventListener("load", () => setTimeout(showNext));
function restyle(change) {
  plots.forEach((plot) => Plotly.relayout(plot, change));
}
dark.addEventListener("change", () => restyle({ "font.color": ink() }));
addEventListener("beforeprint", () => {
  while (waiting.length) show(waiting.shift());
  restyle({ "font.color": "#000", width: 680 });
});
addEventListener("afterprint", () => restyle({ "font.color": ink(), width: null, autosize: true }));
