// The home page in development: it shows what runs, copies commands, and posts what a form contains.

const INTERVAL = 2000; // Milliseconds between two requests.

function repeat(action) {
  const run = async () => {
    if (!document.hidden) await action().catch(() => undefined);
    setTimeout(run, INTERVAL);
  };
  setTimeout(run, INTERVAL);
}

for (const part of document.querySelectorAll("[data-live]")) {
  repeat(async () => {
    const response = await fetch(part.dataset.live);
    const text = response.ok ? await response.text() : null;
    // A link that has the focus, or text that is selected, stays.
    const used = part.contains(document.activeElement) || !document.getSelection().isCollapsed;
    if (text !== null && !used) part.innerHTML = text;
  });
}

// Each command has a button that copies it.
for (const code of navigator.clipboard ? document.querySelectorAll(".welcome pre, .welcome dd code") : []) {
  const button = document.createElement("button");
  button.textContent = "Copy";
  button.type = "button";
  button.className = "copy";
  button.setAttribute("aria-label", `Copy: ${code.textContent}`);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), INTERVAL);
  });
  code.after(" ", button);
}

// A form that posts JSON to an API, and then shows the status of the new object. "data-page" is the
// path of its page, with 0 in place of its id.
for (const form of document.querySelectorAll("form[data-post]")) {
  const output = form.querySelector("output");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const {csrfmiddlewaretoken: token, ...data} = Object.fromEntries(new FormData(form));
    const response = await fetch(form.dataset.post, {
      method: "POST",
      headers: {"Content-Type": "application/json", "X-CSRFToken": token},
      body: JSON.stringify(data),
    });
    const created = await response.json();
    if (!response.ok) {
      output.textContent = `${response.status}: ${JSON.stringify(created)}`;
      return;
    }
    form.reset();
    const link = document.createElement("a");
    link.href = form.dataset.page.replace("/0/", `/${created.id}/`);
    link.target = "_blank";
    const item = document.createElement("p");
    const show = (status) => {
      link.textContent = `Number ${created.id}`;
      item.replaceChildren(link, ` is ${status}.`);
    };
    show(created.status);
    output.append(item);
    repeat(async () => show((await (await fetch(`${form.dataset.post}${created.id}/`)).json()).status));
  });
}
