"use strict";
// Shows the text of a mark at the pointer, or of the marks in turn with the arrow keys. Without this
// script the browser shows the same texts, because they are the titles of the marks.
{
  const tip = document.getElementById("tip");
  const texts = new WeakMap();
  let current = null;

  function hide() {
    if (current) current.classList.remove("current");
    current = null;
    tip.hidden = true;
  }

  function show(mark, x, y) {
    if (mark !== current) {
      hide();
      current = mark;
      mark.classList.add("current");
      tip.textContent = texts.get(mark);
      tip.hidden = false;
    }
    const box = tip.getBoundingClientRect();
    const left = Math.min(x + 12, innerWidth - box.width - 8);
    const top = y + 16 + box.height > innerHeight ? y - box.height - 12 : y + 16;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  }

  function step(key, position, count) {
    if (key === "ArrowRight" || key === "ArrowDown") return Math.min(position + 1, count - 1);
    if (key === "ArrowLeft" || key === "ArrowUp") return Math.max(position - 1, 0);
    if (key === "Home") return 0;
    return key === "End" ? count - 1 : null;
  }

  for (const plot of document.querySelectorAll("svg.plot")) {
    const marks = [...plot.querySelectorAll(".mark")];
    for (const mark of marks) {
      const title = mark.querySelector("title");
      texts.set(mark, title.textContent);
      title.remove();
    }
    const onPointer = (event) => {
      const mark = event.target.closest(".mark");
      if (mark) show(mark, event.clientX, event.clientY);
      else hide();
    };
    plot.addEventListener("pointermove", onPointer);
    plot.addEventListener("pointerdown", onPointer);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide();
      if (event.altKey || event.ctrlKey || event.metaKey || !marks.length) return;
      const next = step(event.key, marks.indexOf(current), marks.length);
      if (next === null) return;
      event.preventDefault();
      const box = marks[next].getBoundingClientRect();
      show(marks[next], box.right, box.bottom);
    });
  }
}
