package httpx

import (
	"net/http"
	"strings"
)

// AddWarning adds text to the Warning headers in the form that kubectl and
// client-go show to their user. Text is cut at 256 bytes, which is what the
// API server allows itself per warning; control characters become spaces.
func AddWarning(h http.Header, text string) {
	text = strings.ToValidUTF8(text, "?")
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
	if len(text) > 256 {
		text = strings.ToValidUTF8(text[:256], "")
	}
	h.Add("Warning", `299 - "`+quoter.Replace(text)+`"`)
}

// quoter escapes what a quoted-string of RFC 9110 must not hold bare.
var quoter = strings.NewReplacer(`\`, `\\`, `"`, `\"`)
