// Package httpx holds the few things about serving HTTP that several parts
// of Yurt share: a server with sane limits that lives as long as a context,
// Kubernetes Status replies, Warning headers and a recorder of what was
// replied. It holds no policy and knows no part.
package httpx
