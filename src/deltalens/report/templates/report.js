"use strict";
(function () {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Colours come from the page's style, so that charts follow the reader's light or dark setting.
  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: get("--line"), zerolinecolor: get("--line"), linecolor: get("--line") };
    const copy = JSON.parse(JSON.stringify(layout));
    copy.paper_bgcolor = "rgba(0,0,0,0)";
    copy.plot_bgcolor = "rgba(0,0,0,0)";
    copy.font = { color: get("--ink"), size: 12, family: 'system-ui, "Segoe UI", Roboto, sans-serif' };
    copy.modebar = { bgcolor: "rgba(0,0,0,0)", color: get("--soft"), activecolor: get("--link") };
    copy.hoverlabel = { bgcolor: get("--panel"), bordercolor: get("--line"), font: { color: get("--ink") } };
    copy.xaxis = Object.assign({}, axis, copy.xaxis);
    copy.yaxis = Object.assign({}, axis, copy.yaxis);
    return copy;
  }

  function draw(id, traces, layout) {
    const place = document.getElementById("chart-" + id);
    if (place) Plotly.react(place, traces, themed(layout), config);
  }

  function drawHeatmap() {
    const choice = document.getElementById("metric");
    if (data.heatmap && choice) {
      draw("heatmap", [data.heatmap.metrics[choice.value].trace], data.heatmap.layout);
    }
  }

  function drawSpectrum() {
    const choice = document.getElementById("tensor");
    if (!data.spectra || !choice) return;
    const curve = data.spectra.curves[Number(choice.value)];
    const kinds = [
      ["delta", "update Δ", "lines+markers", "solid"],
      ["gaussian", "Gaussian update of the same shape and norm", "lines", "dash"],
      ["source", "source W", "lines", "dot"],
    ];
    const traces = kinds
      .filter((kind) => curve[kind[0]])
      .map((kind) => ({
        type: "scatter", mode: kind[2], name: kind[1], x: curve.index, y: curve[kind[0]],
        line: { color: data.spectra.colours[kind[0]], dash: kind[3], width: 2 }, marker: { size: 5 },
        hovertemplate: "σ(%{x}) = %{y:.3~g}<extra>" + kind[1] + "</extra>",
      }));
    draw("spectra", traces, data.spectra.layout);
  }

  function drawAll() {
    for (const id of Object.keys(data.figures)) draw(id, data.figures[id].data, data.figures[id].layout);
    drawHeatmap();
    drawSpectrum();
  }

  for (const [id, listener] of [["metric", drawHeatmap], ["tensor", drawSpectrum]]) {
    const choice = document.getElementById(id);
    if (choice) choice.addEventListener("change", listener);
  }
  dark.addEventListener("change", drawAll);
  drawAll();
})();
