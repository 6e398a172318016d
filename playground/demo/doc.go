// Package demo is the playground's main job: it shows on real machines that
// an edge node whose link is cut and whose power fails runs its pods again,
// measures how long each step takes beside a machine with the API server at
// hand, and judges the outcome.
package demo
