'use strict';

/* Draws tokens and heat maps on canvases. The functions do not depend on the page that uses them. */

const byId = (name) => document.getElementById(name);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const percent = (share) => `${(100 * share).toPrecision(share < 0.001 ? 1 : share < 0.995 ? 2 : 3)} %`;
const macsText = (macs) => (macs < 5e8 ? `${(macs / 1e6).toPrecision(3)} M` : `${(macs / 1e9).toPrecision(3)} G`);

function make(parent, tag, kind, text) {
  const element = parent.appendChild(document.createElement(tag));
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

/* Prepare an image for drawing: its grid of patches, its grey version, and the mean colour of every patch. */
function makePicture(image, patch) {
  const {width, height} = image;
  const picture = {image, patch, rows: height / patch, columns: width / patch,
                   scale: Math.max(1, Math.round(560 / Math.max(width, height))), grey: document.createElement('canvas')};
  picture.count = picture.rows * picture.columns;
  Object.assign(picture.grey, {width, height});
  const pen = picture.grey.getContext('2d');
  pen.drawImage(image, 0, 0);
  const pixels = pen.getImageData(0, 0, width, height);
  picture.colours = meanColours(picture, pixels.data);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const [r, g, b] = pixels.data.subarray(at, at + 3);
    pixels.data.fill(0.299 * r + 0.587 * g + 0.114 * b, at, at + 3);
  }
  pen.putImageData(pixels, 0, 0);
  return picture;
}

function meanColours(picture, pixels) {
  const means = Array.from({length: picture.count}, () => [0, 0, 0]), {width} = picture.image;
  for (let at = 0; at < pixels.length / 4; at++) {
    const row = Math.floor(at / width / picture.patch), column = Math.floor(at % width / picture.patch);
    const mean = means[row * picture.columns + column];
    for (let channel = 0; channel < 3; channel++) mean[channel] += pixels[4 * at + channel] / picture.patch ** 2;
  }
  return means;
}

/* Set the size of a canvas, and draw the image on it. */
function drawImage(picture, canvas) {
  const {image, scale} = picture, pen = canvas.getContext('2d');
  if (canvas.width !== image.width * scale || canvas.height !== image.height * scale) {
    Object.assign(canvas, {width: image.width * scale, height: image.height * scale});
  }
  pen.imageSmoothingEnabled = image.width >= 128;
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  return pen;
}

function eachPatch(picture, act) {
  const cell = picture.patch * picture.scale;
  for (let patch = 0; patch < picture.count; patch++) {
    act(patch, (patch % picture.columns) * cell, Math.floor(patch / picture.columns) * cell, cell);
  }
}

function fill(pen, paint, alpha, x, y, cell) {
  pen.globalAlpha = alpha;
  pen.fillStyle = paint;
  pen.fillRect(x, y, cell, cell);
  pen.globalAlpha = 1;
}

/* The patches of every token. `groups` has the token of each patch; -1 for a hidden patch. */
function membersOf(groups) {
  const members = new Map();
  groups.forEach((group, patch) => group >= 0 && members.set(group, [...(members.get(group) || []), patch]));
  return members;
}

/* Draw the tokens of a stage: hidden patches fade by `fade`, merged patches get their mean colour and a line. */
function drawTokens(picture, canvas, groups, {faded, edge, fade = 0.8}) {
  const pen = drawImage(picture, canvas), members = membersOf(groups);
  const merged = (patch) => groups[patch] >= 0 && members.get(groups[patch]).length > 1;
  const {width, height} = picture.image, {scale} = picture;
  eachPatch(picture, (patch, x, y, cell) => {
    if (groups[patch] < 0) {
      pen.drawImage(picture.grey, x / scale, y / scale, picture.patch, picture.patch, x, y, cell, cell);
      fill(pen, faded, fade, x, y, cell);
    } else if (merged(patch)) {
      const all = members.get(groups[patch]);
      const mean = [0, 1, 2].map((channel) => all.reduce((sum, each) => sum + picture.colours[each][channel], 0));
      fill(pen, `rgb(${mean.map((sum) => Math.round(sum / all.length)).join()})`, 1, x, y, cell);
    }
  });
  drawEdges(picture, pen, (one, other) => groups[one] !== groups[other] && (merged(one) || merged(other)), '#fff');
  drawEdges(picture, pen, (one, other) => (groups[one] < 0) !== (groups[other] < 0), edge);
}

/* Draw a heat map. `paint` returns the colour of a patch, or null; patches without a colour fade by `fade(patch)`. */
function drawHeat(picture, canvas, paint, fade, faded) {
  const pen = drawImage(picture, canvas);
  pen.drawImage(picture.grey, 0, 0, canvas.width, canvas.height);
  eachPatch(picture, (patch, x, y, cell) => {
    const colour = paint(patch);
    fill(pen, colour || faded, colour ? 0.78 : fade(patch), x, y, cell);
  });
  return pen;
}

/* Draw a line between neighbouring patches that differ. */
function drawEdges(picture, pen, differ, paint) {
  const {columns, count} = picture;
  pen.strokeStyle = paint;
  pen.lineWidth = pen.canvas.width / 260;
  pen.beginPath();
  eachPatch(picture, (patch, x, y, cell) => {
    if ((patch + 1) % columns && differ(patch, patch + 1)) {
      pen.moveTo(x + cell, y);
      pen.lineTo(x + cell, y + cell);
    }
    if (patch + columns < count && differ(patch, patch + columns)) {
      pen.moveTo(x, y + cell);
      pen.lineTo(x + cell, y + cell);
    }
  });
  pen.stroke();
}

/* The colour of a share of the brightest value. `colours` holds the red, green and blue of each level. */
function heatColour(colours, share) {
  const at = 3 * Math.round(share * (colours.length / 3 - 1));
  return `rgb(${colours.subarray(at, at + 3).join()})`;
}

function drawScale(canvas, colours) {
  const pen = canvas.getContext('2d');
  for (let at = 0; at < canvas.width; at++) {
    pen.fillStyle = heatColour(colours, at / (canvas.width - 1));
    pen.fillRect(at, 0, 1, 1);
  }
}

/* List classes with their probabilities as bars. */
function drawGuesses(parent, guesses) {
  for (const [name, share] of guesses) {
    const guess = make(parent, 'div', 'guess');
    make(guess, 'span', '', name);
    make(guess, 'span', '', `${(100 * share).toFixed(1)} %`);
    make(guess, 'i').style.width = `${100 * share}%`;
  }
}
