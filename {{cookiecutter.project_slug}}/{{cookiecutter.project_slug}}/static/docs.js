"use strict";

// Shows Swagger UI in the color scheme of the system.
{
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const update = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
    dark.addEventListener("change", update);
    update();
}
