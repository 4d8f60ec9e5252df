"use strict";
(function () {
  // Tables: a click on a header sorts by it, a second one the other way round.
  document.querySelectorAll("table.sortable").forEach(function (table) {
    table.querySelectorAll("th").forEach(function (head, column) {
      head.addEventListener("click", function () {
        var up = head.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        var body = table.tBodies[0], rows = Array.from(body.rows);
        var key = function (row) {
          var text = row.cells[column].textContent.trim(), number = parseFloat(text);
          if (text === "exact") return Infinity;
          if (text === "") return NaN;
          return isNaN(number) ? text : number;
        };
        rows.sort(function (a, b) {
          var x = key(a), y = key(b);
          if (x !== x || y !== y) return (x !== x ? 1 : 0) - (y !== y ? 1 : 0);
          if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        });
        rows.forEach(function (row) { body.appendChild(row); });
      });
    });
  });
  // Fields that leave only the rows with a word.
  document.querySelectorAll("input.find").forEach(function (field) {
    field.addEventListener("input", function () {
      var word = field.value.toLowerCase(), rows = document.getElementById(field.dataset.of).querySelectorAll("tbody tr");
      rows.forEach(function (row) { row.hidden = row.textContent.toLowerCase().indexOf(word) < 0; });
    });
  });
  // Drawings: wheel and pinch zoom, dragging moves, buttons do both for the rest of us.
  document.querySelectorAll(".drawing").forEach(function (place) {
    var svg = place.querySelector("svg"), whole = svg.getAttribute("viewBox").split(" ").map(Number), view;
    var show = function () { svg.setAttribute("viewBox", view.join(" ")); };
    var start = function () { // one unit a pixel, at the top; a narrow graph in the middle
      var w = Math.max(svg.clientWidth || 900, 420), h = w * (svg.clientHeight || 500) / (svg.clientWidth || 900);
      view = [whole[2] < w ? whole[0] + (whole[2] - w) / 2 : whole[0], whole[1], w, h]; show();
    };
    var zoom = function (by, x, y) {
      view = [x - (x - view[0]) * by, y - (y - view[1]) * by, view[2] * by, view[3] * by]; show();
    };
    var point = function (event) {
      var box = svg.getBoundingClientRect();
      var unit = Math.max(view[2] / box.width, view[3] / box.height);
      return [view[0] + view[2] / 2 + (event.clientX - box.left - box.width / 2) * unit,
        view[1] + view[3] / 2 + (event.clientY - box.top - box.height / 2) * unit, unit];
    };
    var held = new Map(), moved = false;
    svg.addEventListener("wheel", function (event) {
      event.preventDefault();
      var at = point(event); zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, at[0], at[1]);
    }, { passive: false });
    svg.addEventListener("pointerdown", function (event) { held.set(event.pointerId, event); moved = false; });
    svg.addEventListener("pointermove", function (event) {
      var before = held.get(event.pointerId);
      if (!before) return;
      var dx = event.clientX - before.clientX, dy = event.clientY - before.clientY;
      if (held.size === 1) {
        if (!moved && Math.abs(dx) + Math.abs(dy) < 4) return;
        var unit = point(event)[2];
        view[0] -= dx * unit; view[1] -= dy * unit; show();
      } else {
        var other; held.forEach(function (event_, id) { if (id !== event.pointerId) other = event_; });
        var was = Math.hypot(before.clientX - other.clientX, before.clientY - other.clientY);
        var now = Math.hypot(event.clientX - other.clientX, event.clientY - other.clientY);
        var at = point(other); if (was > 0 && now > 0) zoom(was / now, at[0], at[1]);
      }
      moved = true; held.set(event.pointerId, event);
    });
    ["pointerup", "pointercancel", "pointerleave"].forEach(function (name) {
      svg.addEventListener(name, function (event) { held.delete(event.pointerId); });
    });
    svg.addEventListener("click", function (event) { if (moved) event.preventDefault(); }, true);
    svg.addEventListener("dragstart", function (event) { event.preventDefault(); });
    place.querySelectorAll("button").forEach(function (button) {
      button.addEventListener("click", function () {
        if (button.dataset.zoom === "fit") { view = whole.slice(); show(); return; }
        zoom(button.dataset.zoom === "in" ? 0.75 : 1 / 0.75, view[0] + view[2] / 2, view[1] + view[3] / 2);
      });
    });
    place.showNode = function (node) {
      var box = node.getBBox();
      view[0] = box.x + box.width / 2 - view[2] / 2; view[1] = box.y + box.height / 2 - view[3] / 2; show();
      document.querySelectorAll(".marked").forEach(function (other) { other.classList.remove("marked"); });
      node.querySelector(".node").classList.add("marked");
      place.scrollIntoView({ block: "center" });
    };
    start();
    // On paper a long drawing goes on beside itself, as columns do, at a size that can be read.
    var slices = document.createElement("div"); slices.className = "slices"; place.appendChild(slices);
    window.addEventListener("beforeprint", function () {
      var scale = Math.min(0.62, 700 / whole[2]), tall = 860 / scale;
      slices.textContent = "";
      for (var top = 0; top < whole[3]; top += tall) {
        var slice = svg.cloneNode(true), height = Math.min(tall, whole[3] - top);
        slice.querySelectorAll("[id]").forEach(function (part) { part.removeAttribute("id"); });
        slice.setAttribute("viewBox", [whole[0], whole[1] + top, whole[2], height].join(" "));
        slice.style.width = whole[2] * scale + "px"; slice.style.height = height * scale + "px";
        slices.appendChild(slice);
      }
      place.classList.add("sliced");
    });
    window.addEventListener("afterprint", function () { place.classList.remove("sliced"); slices.textContent = ""; });
  });
  document.addEventListener("click", function (event) {
    var link = event.target.closest ? event.target.closest("a[href^='#']") : null;
    if (!link) return;
    var target = document.getElementById(link.getAttribute("href").slice(1));
    if (!target) return;
    var drawing = target.closest(".drawing");
    if (drawing) { event.preventDefault(); drawing.showNode(target); }
    for (var part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    target.hidden = false;
  });
  document.querySelectorAll(".copy").forEach(function (button) {
    button.addEventListener("click", function () {
      var text = document.getElementById(button.dataset.of).textContent, done = function () { button.textContent = "copied"; };
      if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, function () {});
      else { var range = document.createRange(); range.selectNode(document.getElementById(button.dataset.of));
        getSelection().removeAllRanges(); getSelection().addRange(range); document.execCommand("copy"); done(); }
    });
  });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (part) { part.open = true; });
  });
})();
