"use strict";

// Tells below the field what the chosen crontab means, in words.
{
  const $ = django.jQuery;
  const readable = JSON.parse($("#readable-crontabs").text());
  const words = $("<div>").appendTo(".field-crontab .help");
  const tell = () => words.text(readable[$("#id_crontab").val()] ?? "");

  $(".field-crontab_translation").hide();
  $("#id_crontab").on("change", tell);
  tell();
}
