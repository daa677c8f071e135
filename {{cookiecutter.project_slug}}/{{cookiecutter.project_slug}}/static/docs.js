"use strict";

// Shows Swagger UI in the color scheme of the system.
{
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const update = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
    dark.addEventListener("change", update);
    update();
}

addEventListener("DOMContentLoaded", () => {
    const { schema, csrfToken } = document.getElementById("swagger-ui").dataset;
    SwaggerUIBundle({
        dom_id: "#swagger-ui",
        url: schema,
        deepLinking: true,
        requestInterceptor: (request) => {
            // Logged-in users need the token; it must not be sent to other sites.
            if (new URL(request.url, location).origin === location.origin) {
                request.headers["X-CSRFToken"] = csrfToken;
            }
            return request;
        },
    });
});
