// Draws every figure from the data beside it and gives its text the colour of the page.
// Of plotly's buttons only the image download stays: one of the others would send the data to a server.
const dark = matchMedia("(prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll("figure")].map((figure) => {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  spec.layout.font.color = ink();
  const plot = figure.querySelector(".plot");
  Plotly.newPlot(plot, spec.data, spec.layout, { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] });
  return plot;
});
function ink() {
  return getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
}
function restyle(change) {
  plots.forEach((plot) => Plotly.relayout(plot, change));
}
dark.addEventListener("change", () => restyle({ "font.color": ink() }));
addEventListener("beforeprint", () => restyle({ "font.color": "#000", width: 680 }));
addEventListener("afterprint", () => restyle({ "font.color": ink(), width: null, autosize: true }));
