"""Why an image candidate is invalid or was not selected: as tables and counts say it, and as a sentence."""

NOT_FINITE = "not finite"
BLACK = "black"
SCORE_NOT_FINITE = "score not finite"
LOWER = "a lower score"
UNDETECTED = "no detection"
LESS_SURE = "detected less surely"
NO_MARGIN = "no margin"
SAME_IMAGE = "same image twice"
TOO_FEW = "no second image"

SENTENCES = {
    NOT_FINITE: "the model generated values that are not finite numbers",
    BLACK: "the image is black",
    SCORE_NOT_FINITE: "a score of this image is not a finite number",
    LOWER: "another image of the prompt has a higher score",
    UNDETECTED: "the detector did not find the class, or not surely enough",
    LESS_SURE: "the detector is surer of the class on another image with the same hard score",
    NO_MARGIN: "the scores of this prompt's images differ too little for a pair",
    SAME_IMAGE: "the images that would make a pair are identical",
    TOO_FEW: "the prompt has no second valid image to compare with",
}
