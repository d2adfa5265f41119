"use strict";
const box = document.getElementById("search"), input = box.querySelector("input"), said = box.querySelector("[role=status]");
const body = box.querySelector("tbody"), table = box.querySelector("table");
const rows = JSON.parse(document.getElementById("class-figures").textContent), most = 50;
function show() {
  const wanted = input.value.trim().toLowerCase();
  const found = wanted ? rows.filter(row => row[0].toLowerCase().includes(wanted)) : [];
  body.replaceChildren(...found.slice(0, most).map(row => {
    const line = document.createElement("tr");
    row.forEach((text, i) => {
      const cell = line.appendChild(document.createElement(i ? "td" : "th"));
      cell.textContent = text;
      if (i && i !== 2) cell.className = "number";
    });
    return line;
  }));
  table.hidden = !found.length;
  said.textContent = wanted ? `${found.length} of ${rows.length} classes${found.length > most ? `, the first ${most} are shown` : ""}` : "";
}
input.addEventListener("input", show);
box.hidden = false;
show();
